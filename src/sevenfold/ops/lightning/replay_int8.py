"""Decoding with states in int8: recent tokens stay exact in a ring, and a state is rounded rarely.

A state that is quantised at every token drowns in its own rounding (docs/low-precision.md). Here it
is quantised when the ring is folded into it, once in R tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.ops.lightning.replay import ReplayPool, lightning_attention_replay
from sevenfold.ops.lightning.verify import lightning_attention_commit
from sevenfold.ops.low_precision import dequantise_rows, quantise_rows


@dataclass(frozen=True)
class Int8ReplayPool:
    """States of one layer in int8, and the tokens that each of them still lacks, as ReplayPool's.

    Attributes:
        codes: [S, H, K, V] int8.
        scale: [S, H, K] fp32, of each head and key channel.
        ring_k: [S, H, R, K], the tokens' dtype: bf16, fp16 or fp32.
        ring_v: [S, H, R, V].
        count: [S, H] int32, tokens in the ring, alike in all heads.
    """

    codes: Tensor
    scale: Tensor
    ring_k: Tensor
    ring_v: Tensor
    count: Tensor

    def read(self, slots: Tensor, log_decay: Tensor) -> Tensor:
        """Return the states after every token so far, [N, H, K, V] fp32; the pool is unchanged.

        Args:
            slots: [N] int64.
            log_decay: [H] fp32.
        """
        taken = self.gather(slots)
        lightning_attention_commit(log_decay, taken, torch.arange(len(slots), device=slots.device))
        return taken.state

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Quantise states [N, H, K, V] fp32 into slots [N], whose rings are empty from then on."""
        self.codes[slots], self.scale[slots] = quantise_rows(states)
        self.count[slots] = 0

    def gather(self, slots: Tensor) -> ReplayPool:
        """Return the slots as a pool of their own, in fp32: copies."""
        state = dequantise_rows(self.codes[slots], self.scale[slots])
        rings = (self.ring_k[slots], self.ring_v[slots], self.count[slots])
        return ReplayPool(state, *(ring.contiguous() for ring in rings))


def lightning_attention_replay_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Int8ReplayPool,
    slots: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Run one token of each sequence over states in int8.

        o = lightning_attention_replay over codes * scale and the ring
        where the ring was full: codes, scale = quantise_rows(the state that it was folded into)

    Between two folds the state is the same and the ring is exact, so what an output lacks is one
    rounding for each R tokens, each of at most half a step of its row.

    Args:
        q, k: [B, H, K], the dtype of the pool's rings.
        v: [B, H, V], dtype of q.
        log_decay: [H] fp32, <= 0.
        pool: changed in place.
        slots: [B] int64, each sequence's slot, no two alike, 0 to S - 1.
        scale: multiplies the output.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_replay.
    """
    taken, own = pool.gather(slots), torch.arange(len(slots), device=slots.device)
    before = taken.count[:, 0].clone()
    o = lightning_attention_replay(q, k, v, log_decay, taken, own, scale=scale)
    folded = (taken.count[:, 0] <= before).nonzero().squeeze(1)
    if len(folded):
        rows = quantise_rows(taken.state[folded])
        pool.codes[slots[folded]], pool.scale[slots[folded]] = rows
    pool.ring_k[slots], pool.ring_v[slots] = taken.ring_k, taken.ring_v
    pool.count[slots] = taken.count
    return o
