"""Softmax attention of a block that is run again for its backward: its result is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.blocks import (
    attention_block,
    attention_block_backward,
    default_block_impl,
)
from sevenfold.ops.types import Impl


class KeptResult:
    """o and lse of one attention, from its first run to its second.

    Nothing else of it is needed again but queries, keys and values, which the second run makes
    anyway: of long rows their product is most of the work.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor] | None = None

    @property
    def known(self) -> tuple[Tensor, Tensor] | None:
        """o and lse; None before the first run."""
        return self._known

    def keep(self, o: Tensor, lse: Tensor) -> None:
        """Keep what the first run gave, without its graph."""
        self._known = (o.detach(), lse.detach())


def suits_keeping(q: Tensor, v: Tensor, lengths: Sequence[int]) -> bool:
    """Whether attention over whole sequences has a form whose result can be kept: on a GPU.

    Args:
        q: [B, T, H, D].
        v: [B, T, G, D].
        lengths: tokens of each sequence.
    """
    block = Block(lengths, lengths, 1.0, causal=True)
    whole = bool(lengths) and min(lengths) > 0 and q.shape[-1] == v.shape[-1]
    return whole and default_block_impl(q.flatten(0, 1), v.flatten(0, 1), block) is not Impl.EAGER


def attention_kept(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Sequence[int], scale: float, kept: KeptResult
) -> Tensor:
    """Causal softmax attention over whole sequences, computed once for two runs.

        o_i = sum_j softmax_j(scale * q_i^T k_j) v_j    over j <= i

    Args:
        q: [B, T, H, D]; B * T tokens hold N sequences one after another.
        k, v: [B, T, G, D], dtype of q; G divides H.
        lengths: tokens of each sequence, at least 1; they sum to B * T.
        scale: multiplies the scores.
        kept: of this call. Where it knows a result that is taken for the product; else the result
            is put there.

    Returns:
        [B, T, H, D] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as attention_block.
    """
    block = Block(lengths, lengths, scale, causal=True)
    tokens = (x.flatten(0, 1) for x in (q, k, v))
    return _Kept.apply(*tokens, block, kept).view(q.shape)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: Block, kept: KeptResult
    ) -> Tensor:
        known = kept.known
        if known is None:
            known = attention_block(q, k, v, block)
            kept.keep(*known)
        o, lse = known[0].view_as(known[0]), known[1]
        ctx.block = block
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        found = attention_block_backward(grads[0], (q, k, v), o, lse, ctx.block)
        return *found, None, None
