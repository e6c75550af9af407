"""A whole mixture of experts in fp32 on a CPU, block by block of rows, by numba."""

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sevenfold.ops.compiled import empty, lent, use_torch_threads
from sevenfold.ops.experts import compiled
from sevenfold.ops.experts.mkl_mixture import MklMixture
from sevenfold.ops.experts.token_gradients import token_gradients
from sevenfold.ops.linear import mkl

# Rows of a block that hold nothing: without them, blocks of 2^n rows compete for one place of the
# cache.
_GAP = 1


def mixture(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    choice: Tensor,
    row: Tensor,
    rows_per_expert: Tensor,
) -> Tensor:
    """The mixture; arguments and result as in the public operator."""
    x, weights = x.contiguous(), weights.to(x.dtype).contiguous()
    inputs = (x, weights, gate_up_proj.contiguous(), down_proj.contiguous())
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        by = MklMixture if mkl.FASTEST else _Mixture
        return by.apply(*inputs, choice, row, rows_per_expert)
    blocks = np.concatenate(_blocks(rows_per_expert))
    return _forward(*inputs, choice, row, blocks, empty(0, *_block_shape(gate_up_proj)))


def _blocks(rows_per_expert: Tensor) -> list[np.ndarray]:
    """For each expert its blocks [B, 3]: the expert, the first of its rows, and how many."""
    counts, size = rows_per_expert.tolist(), compiled.BLOCK_ROWS
    blocks = []
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        first = np.arange(end - count, end, size, dtype=np.int64)
        blocks.append(
            np.stack([np.full_like(first, expert), first, np.minimum(end - first, size)], 1)
        )
    return blocks


def _block_shape(gate_up_proj: Tensor) -> tuple[int, int]:
    return gate_up_proj.shape[1], compiled.BLOCK_ROWS


def _forward(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    choice: Tensor,
    row: Tensor,
    blocks: np.ndarray,
    kept: Tensor,
) -> Tensor:
    token, D = choice // row.shape[1], x.shape[1]
    rows, y = empty(len(choice), D), empty(len(x), D)
    use_torch_threads()
    inputs = (lent(t) for t in (x, token, gate_up_proj, down_proj))
    units = compiled.units(len(blocks), D + down_proj.shape[2], torch.get_num_threads())
    compiled.feed(*inputs, blocks, kept.numpy(), rows.numpy(), units)
    compiled.combine(*(t.detach().numpy() for t in (rows, row, weights, y)))
    return y


class _Room:
    """What one expert's gradients need at once; the next expert finds it warm."""

    def __init__(self, num_blocks: int, gate_up_proj: Tensor) -> None:
        _, F2, D = gate_up_proj.shape
        size = compiled.BLOCK_ROWS
        self.hidden = empty(num_blocks, F2 // 2 + _GAP, size)
        self.dgate_up = empty(num_blocks, F2 + _GAP, size)
        self.panels = empty(D // size, num_blocks, size, size)


class _Mixture(torch.autograd.Function):
    """Saves the inputs and the first product of each block; all else is computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        choice: Tensor,
        row: Tensor,
        rows_per_expert: Tensor,
    ) -> Tensor:
        inputs = (x, weights, gate_up_proj, down_proj, choice, row)
        blocks = np.concatenate(_blocks(rows_per_expert))
        kept = empty(len(blocks), *_block_shape(gate_up_proj))
        y = _forward(*inputs, blocks, kept)
        ctx.save_for_backward(*inputs, rows_per_expert, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up_proj, down_proj, choice, row, rows_per_expert, kept = ctx.saved_tensors
        dy, share, token = grads[0].contiguous(), weights.flatten()[choice], choice // row.shape[1]
        drows, dshare = empty(len(choice), x.shape[1]), torch.empty_like(share)
        dgate_up_proj = torch.zeros_like(gate_up_proj)
        ddown_proj_t = down_proj.new_zeros(down_proj.mT.shape)
        use_torch_threads()
        inputs = [lent(t) for t in (dy, token, share, gate_up_proj, down_proj)]
        of_experts, done = _blocks(rows_per_expert), 0
        room = _Room(max(map(len, of_experts)), gate_up_proj)
        for e, blocks in enumerate(of_experts):
            if not len(blocks):
                continue
            first_product = kept[done : done + len(blocks)]
            done += len(blocks)
            outputs = (first_product, room.hidden, room.dgate_up, drows, dshare)
            compiled.feed_backward(*inputs, blocks, *(t.numpy() for t in outputs))
            for left, right, out in (
                (room.dgate_up, x, dgate_up_proj[e]),
                (room.hidden, dy, ddown_proj_t[e]),
            ):
                panels = room.panels.numpy()
                compiled.gather(right.numpy(), inputs[1], blocks, panels)
                compiled.weight_gradient(left.numpy(), panels, len(blocks), out.numpy())
        dx, dweights = token_gradients(drows, dshare, choice, row)
        return dx, dweights, dgate_up_proj, ddown_proj_t.mT, None, None, None
