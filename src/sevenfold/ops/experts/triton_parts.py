"""Rows of experts in three parts, each a tensor of its own: nobody joins them to sum, or cuts them.

A choice's row lies in one of the three; of the others nothing is read or written. All rows are
somebody's, so that nothing needs zeros.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.experts.triton_rows import COLUMNS, WARPS
from sevenfold.ops.operator import operator
from sevenfold.ops.row_launch import cdiv
from sevenfold.ops.triton_launched import launched

# Ends of the parts change from step to step.
_ENDS = ["first_end", "second_end", "num_rows"]


@triton.jit
def _place(first_ptr, second_ptr, third_ptr, row, first_end, second_end, D):
    """Where a row lies; a place like another for the row of a dropped choice."""
    second = tl.where(
        row < second_end, second_ptr + (row - first_end) * D, third_ptr + (row - second_end) * D
    )
    return tl.where(row < first_end, first_ptr + row * D, second)


@launched
@triton.jit(do_not_specialize=_ENDS)
def _sum_kernel(
    first_ptr, second_ptr, third_ptr, weights_ptr, row_ptr, y_ptr,
    first_end, second_end, num_rows, D, K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(row_ptr + token * K + j)
        place = _place(first_ptr, second_ptr, third_ptr, row, first_end, second_end, D)
        inside = (column < D) & (row < num_rows)
        x = tl.load(place + column, inside, 0.0).to(tl.float32)
        if weights_ptr is not None:
            x *= tl.load(weights_ptr + token * K + j).to(tl.float32)
        y += x
    tl.store(y_ptr + token * D + column, y, column < D)


@launched
@triton.jit(do_not_specialize=_ENDS)
def _combine_backward_kernel(
    dy_ptr, first_ptr, second_ptr, third_ptr, weights_ptr, row_ptr,
    dfirst_ptr, dsecond_ptr, dthird_ptr, dweights_ptr,
    first_end, second_end, num_rows, D, K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for j in tl.static_range(K):
        row = tl.load(row_ptr + token * K + j)
        weight = tl.load(weights_ptr + token * K + j).to(tl.float32)
        place = _place(first_ptr, second_ptr, third_ptr, row, first_end, second_end, D)
        target = _place(dfirst_ptr, dsecond_ptr, dthird_ptr, row, first_end, second_end, D)
        dweight = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, D, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            kept = (column < D) & (row < num_rows)
            dy = tl.load(dy_ptr + token * D + column, kept, 0.0).to(tl.float32)
            dweight += dy * tl.load(place + column, kept, 0.0).to(tl.float32)
            tl.store(target + column, weight * dy, kept)
        tl.store(dweights_ptr + token * K + j, tl.sum(dweight, 0))


def _ends(parts: tuple[Tensor, ...]) -> tuple[int, int, int]:
    first, second, third = (len(part) for part in parts)
    return first, first + second, first + second + third


def _sum(parts: tuple[Tensor, ...], weights: Tensor | None, row: Tensor) -> Tensor:
    D = parts[0].shape[1]
    y = torch.empty(len(row), D, dtype=parts[0].dtype, device=parts[0].device)
    if y.numel():
        _sum_kernel[(len(y), cdiv(D, COLUMNS))](
            *(part.contiguous() for part in parts), weights, row, y, *_ends(parts), D,
            K=row.shape[1], COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return y


@operator("sevenfold::sum_parts")
def sum_parts(first: Tensor, second: Tensor, third: Tensor, row: Tensor) -> Tensor:
    """[T, D], the sum of each token's rows."""
    return _sum((first, second, third), None, row)


@operator("sevenfold::combine_parts")
def combine_parts(
    first: Tensor, second: Tensor, third: Tensor, weights: Tensor, row: Tensor
) -> Tensor:
    """The weighted sum; arguments and result as in the public operator."""
    return _sum((first, second, third), weights.contiguous(), row)


@operator("sevenfold::combine_parts_backward")
def combine_parts_backward(
    dy: Tensor, first: Tensor, second: Tensor, third: Tensor, weights: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the parts and of the weights."""
    parts = (first, second, third)
    dparts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parts]
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    if len(dy):
        _combine_backward_kernel[(len(dy),)](
            dy.contiguous(), *(part.contiguous() for part in parts), weights.contiguous(), row,
            *dparts, dweights, *_ends(parts), dy.shape[1],
            K=row.shape[1], COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return *dparts, dweights


def _like_sum(first: Tensor, second: Tensor, third: Tensor, *rest: Tensor) -> Tensor:
    return first.new_empty(rest[-1].shape[0], first.shape[1])


sum_parts.register_fake(_like_sum)
combine_parts.register_fake(_like_sum)
combine_parts_backward.register_fake(
    lambda dy, first, second, third, weights, row: tuple(
        x.new_empty(x.shape) for x in (first, second, third, weights)
    )
)


def _save_all(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *combine_parts_backward(dy, *ctx.saved_tensors), None


combine_parts.register_autograd(_combine_grads, setup_context=_save_all)
