"""Drafts beside states of fewer bits: verified in fp32 from what the states hold, rounded rarely.

A state is rounded when tokens that count are folded into it, never for a guess. int8 states keep
what is accepted in their ring, where plain decoding keeps its tokens too; others take it up.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sevenfold.engine.state_pool import StatePool
from sevenfold.models import EncodedDrafts
from sevenfold.ops import (
    Int8ReplayPool,
    Noise,
    ReplayPool,
    lightning_attention_commit,
    lightning_attention_verify,
    quantise_rows,
)


class DraftRings(EncodedDrafts):
    """All slots of one layer with their rings."""

    # Whether accepted tokens stay in the ring: then later ones of their draft lie behind them.
    keeps_tokens: bool

    @abstractmethod
    def settle(self, slots: Tensor, accepted: Tensor, log_decay: Tensor, noise: Noise) -> None:
        """Let accepted tokens [N, A] of the last drafts count, so that none of them is pending."""


@dataclass(frozen=True)
class RoundedRings(DraftRings):
    """States in fp16 or bf16, rounded where tokens are folded in; ring_k, ring_v [S, H, R, D]."""

    states: StatePool
    ring_k: Tensor
    ring_v: Tensor
    count: Tensor
    keeps_tokens = False

    def verify(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        log_decay: Tensor,
        slots: Tensor,
        drafts: tuple[Tensor | None, Tensor | None],
        noise: Noise,
    ) -> Tensor:
        """Run drafts; what they fold in is rounded by the noise."""
        taken = self._gather(slots)
        o, folded = _verify(tokens, log_decay, taken, drafts)
        if len(folded):
            some = replace(noise, key=noise.key[folded], position=noise.position[folded])
            self.states.write(slots[folded], taken.state[folded], some)
        self._put_back(slots, taken)
        return o

    def settle(self, slots: Tensor, accepted: Tensor, log_decay: Tensor, noise: Noise) -> None:
        """Fold accepted tokens into the states, and round these once."""
        taken = self._gather(slots)
        lightning_attention_commit(log_decay, taken, _all(slots), accepted=accepted)
        self.states.write(slots, taken.state, noise)
        self._put_back(slots, taken)

    def forget(self, slots: Tensor) -> None:
        """Note that states are new, and lack nothing."""
        self.count[slots] = 0

    def _gather(self, slots: Tensor) -> ReplayPool:
        rings = (self.ring_k[slots], self.ring_v[slots], self.count[slots])
        return ReplayPool(self.states.read(slots), *(ring.contiguous() for ring in rings))

    def _put_back(self, slots: Tensor, taken: ReplayPool) -> None:
        self.ring_k[slots], self.ring_v[slots] = taken.ring_k, taken.ring_v
        self.count[slots] = taken.count


@dataclass(frozen=True)
class Int8Rings(DraftRings):
    """States in int8 behind the ring that they have anyway, longer by a draft."""

    pool: Int8ReplayPool
    keeps_tokens = True

    def verify(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        log_decay: Tensor,
        slots: Tensor,
        drafts: tuple[Tensor | None, Tensor | None],
        noise: Noise,
    ) -> Tensor:
        """Run drafts; rounding to nearest needs no noise."""
        pool = self.pool
        taken = pool.gather(slots)
        o, folded = _verify(tokens, log_decay, taken, drafts)
        if len(folded):
            rows = quantise_rows(taken.state[folded])
            pool.codes[slots[folded]], pool.scale[slots[folded]] = rows
        pool.ring_k[slots], pool.ring_v[slots] = taken.ring_k, taken.ring_v
        pool.count[slots] = taken.count
        return o

    def settle(self, slots: Tensor, accepted: Tensor, log_decay: Tensor, noise: Noise) -> None:
        """Close the gaps between accepted tokens in the ring; nothing is rounded."""
        pool, N, A = self.pool, *accepted.shape
        held, chosen = pool.count[slots, 0].long(), accepted >= 0
        source = held[:, None] + accepted.clamp(min=0)
        target = held[:, None] + torch.arange(A, device=slots.device)
        at = torch.arange(N, device=slots.device)[:, None]
        for ring in (pool.ring_k, pool.ring_v):
            rows = ring[slots].transpose(1, 2).contiguous()  # [N, R, H, D]
            moved = torch.where(chosen[..., None, None], rows[at, source], rows[at, target])
            rows[at, target] = moved
            ring[slots] = rows.transpose(1, 2)
        pool.count[slots] += chosen.sum(1, keepdim=True).int()


def _verify(
    tokens: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor,
    taken: ReplayPool,
    drafts: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Run drafts over slots that were taken out; also which of them were folded into."""
    accepted, ancestors = drafts
    pending = taken.count[:, 0].long()
    if accepted is not None:
        pending = pending + (accepted >= 0).sum(1)
    own = _all(taken.count)
    o = lightning_attention_verify(
        *tokens, log_decay, taken, own, accepted=accepted, ancestors=ancestors
    )
    folded = (pending > 0) & (taken.count[:, 0] == 0)
    return o, folded.nonzero().squeeze(1)


def _all(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)
