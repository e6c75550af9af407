"""Rows of experts in three parts that are computed apart: the public operators.

What joins parts, or is one gradient of several, copies them all. Here each part is a tensor of its
own on the way there, on the way back, and in both gradients.
"""

from typing import Any

import torch
from torch import Tensor

from sevenfold.ops.checks import check_shape, choose_impl
from sevenfold.ops.experts import dispatch_eager
from sevenfold.ops.experts.dispatch import Dispatch, default_dispatch_impl
from sevenfold.ops.triton_rules import check_on_gpu
from sevenfold.ops.types import Impl

Parts = tuple[Tensor, Tensor, Tensor]

_KNOWN = (Impl.EAGER, Impl.TRITON)


def gather_parts(
    x: Tensor,
    rows: Tensor,
    dispatch: Dispatch,
    sizes: tuple[int, int, int],
    *,
    impl: Impl | str | None = None,
) -> Parts:
    """Part rows that gather_rows has copied, each part with a gradient that goes on to x alone.

    The copy can begin before the host knows where the parts end.

    Args:
        x: [T, D].
        rows: [R, D], gather_rows(x, dispatch) without a gradient of its own.
        dispatch: the plan, full.
        sizes: rows of each part, summing to R; a part may have none.
        impl: "eager" or "triton" (sums the parts' gradients where they lie); None takes
            default_dispatch_impl.

    Returns:
        Views of rows; the gradient of x is the sum of each token's rows.

    Raises:
        ValueError: the plan is not full, or sizes do not sum to R.
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.
    """
    chosen = choose_impl("gather_parts", impl, default_dispatch_impl(x), _KNOWN)
    _check(dispatch, sizes)
    check_shape("rows", rows, (sum(sizes), x.shape[1]), "[R, D]")
    if chosen is Impl.TRITON:
        check_on_gpu("x", x)
    return _GatherParts.apply(x, rows, dispatch.row, sizes, chosen)


def combine_parts(
    parts: Parts, weights: Tensor, dispatch: Dispatch, *, impl: Impl | str | None = None
) -> Tensor:
    """Sum each token's rows by weight, as combine does of the parts end to end.

        y_t = sum over choices j of weights_tj * rows[row_tj]        rows = the parts, end to end

    Args:
        parts: three of [n, D] with the R rows of the plan; one may have none.
        weights: [T, k] in the dtype of the parts.
        dispatch: the plan, full.
        impl: "eager" or "triton" (sums in fp32); None takes default_dispatch_impl.

    Returns:
        [T, D] in the dtype of the parts.

    Raises:
        ValueError: the plan is not full, or the parts have not R rows.
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.
    """
    first, second, third = parts
    chosen = choose_impl("combine_parts", impl, default_dispatch_impl(first), _KNOWN)
    _check(dispatch, (len(first), len(second), len(third)))
    if chosen is Impl.EAGER:
        rows = torch.cat(parts)
        return dispatch_eager.combine(rows, weights, dispatch.token, dispatch.row)
    check_on_gpu("parts", first)
    from sevenfold.ops.experts import triton_parts

    return triton_parts.combine_parts(*parts, weights, dispatch.row)


def _check(dispatch: Dispatch, sizes: tuple[int, int, int]) -> None:
    if not dispatch.is_full:
        raise ValueError("dispatch must be full, got a plan whose rows may belong to nobody")
    if sum(sizes) != len(dispatch.choice):
        raise ValueError(f"parts must have {len(dispatch.choice)} rows in all, got {sizes}")


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, row: Tensor, sizes: tuple[int, ...], impl: Impl
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(row)
        ctx.impl = impl
        return rows.split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (row,) = ctx.saved_tensors
        if ctx.impl is Impl.EAGER:
            dx = dispatch_eager.sum_rows(torch.cat(grads), row)
        else:
            from sevenfold.ops.experts import triton_parts

            dx = triton_parts.sum_parts(*grads, row)
        return dx, None, None, None, None
