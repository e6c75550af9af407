"""Drafts in a model: several guesses of a sequence at once, counted only if they are accepted."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sevenfold.ops import Noise, ReplayPool, lightning_attention_verify


@dataclass(frozen=True)
class DraftLayout:
    """How the drafts of N sequences lie in rows [N, T]; one for all layers.

    num_tokens: T, the longest draft's.
    place: [tokens] int64, where each packed token lies: n * T + t; None where the drafts come in
        rows [N, T] already, padded.
    accepted: [N, A] int32, which tokens of its draft before this one each sequence took, then -1;
        None where none has one.
    ancestors: [N, T, T] bool, as lightning_attention_verify; None if all are chains.
    """

    num_tokens: int
    place: Tensor | None
    accepted: Tensor | None
    ancestors: Tensor | None


class EncodedDrafts(ABC):
    """States in a precision that only their owner knows, with rings for drafts."""

    @abstractmethod
    def verify(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        log_decay: Tensor,
        slots: Tensor,
        drafts: tuple[Tensor | None, Tensor | None],
        noise: Noise,
    ) -> Tensor:
        """Run drafts of N sequences from the states before them.

        Args:
            tokens: q, k, v [N, T, H, D].
            log_decay: [H] fp32.
            slots: [N] int64, no two alike.
            drafts: accepted and ancestors, as lightning_attention_verify takes them.
            noise: for each sequence, of what is rounded.

        Returns:
            o [N, T, H, D].
        """


@dataclass(frozen=True)
class DraftedState:
    """States of lightning attention in a pool that keeps drafts beside them.

    slots: [N] int64 on the pool's device, no two alike.
    noise: for states of fewer bits.
    """

    pool: ReplayPool | EncodedDrafts
    slots: Tensor
    layout: DraftLayout
    noise: Noise | None = None

    def advance(self, tokens: Sequence[Tensor], log_decay: Tensor) -> Tensor:
        """Run drafts from the states before them, which stay as they are.

        Args:
            tokens: q, k, v [B, T, H, D], the drafts packed one after another, or [N, T, H, D].
            log_decay: [H] fp32.

        Returns:
            o, of as many elements as v, in their order. A token counts once the next call accepts
            it.
        """
        layout = self.layout
        q, k, v = tokens
        if layout.place is not None:
            shape = (len(self.slots), layout.num_tokens)
            q, k, v = (_in_rows(x.flatten(0, 1), layout.place, shape) for x in tokens)
        o = self._verify((q, k, v), log_decay)
        return o if layout.place is None else o.flatten(0, 1)[layout.place]

    def _verify(self, tokens: tuple[Tensor, Tensor, Tensor], log_decay: Tensor) -> Tensor:
        accepted, ancestors = self.layout.accepted, self.layout.ancestors
        if isinstance(self.pool, EncodedDrafts):
            if self.noise is None:
                raise ValueError("noise must be given for states of fewer bits, got None")
            drafts = (accepted, ancestors)
            return self.pool.verify(tokens, log_decay, self.slots, drafts, self.noise)
        return lightning_attention_verify(
            *tokens, log_decay, self.pool, self.slots, accepted=accepted, ancestors=ancestors
        )


def _in_rows(x: Tensor, place: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed tokens [tokens, H, D] in rows [N, T, H, D]; where a draft is shorter, zeros."""
    rows = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return rows.index_copy(0, place, x).view(*shape, *x.shape[1:])
