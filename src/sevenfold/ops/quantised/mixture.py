"""A mixture of SwiGLU experts whose weights are held in 8 bits: the public operators."""

from collections.abc import Callable

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.experts import Dispatch, combine, gather_rows
from sevenfold.ops.low_precision import FP8, Fp8Rows, Int8Rows
from sevenfold.ops.quantised import eager
from sevenfold.ops.quantised.api import check_fp8_device, check_kernel, default_int8_impl
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.TRITON)
_Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def int8_mixture(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Int8Rows,
    down_proj: Int8Rows,
    dispatch: Dispatch,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """Send each token through its experts, and sum what they make of it by weight.

        mixture(x, weights, codes * scale, codes * scale, dispatch)

    Args:
        x: [T, D], bf16, fp16 or fp32.
        weights: [T, k], any floating dtype.
        gate_up_proj: codes [E, 2 F, D] and scale [E, 2 F], W_gate above W_up.
        down_proj: codes [E, D, F] and scale [E, D].
        dispatch: the plan of the tokens' choices.
        impl: "eager" (dequantises one expert at a time, and none without tokens; reads the counts
            on the host) or "triton" (bf16 and fp16 on a GPU; waits for nothing); None takes
            default_int8_impl. A named one never falls back.

    Returns:
        [T, D] in the dtype of x; a dropped choice adds nothing.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.
    """
    _check(x, weights, (gate_up_proj, down_proj), dispatch, torch.int8)
    if choose_impl("int8_mixture", impl, default_int8_impl(x), _IMPLS) is Impl.EAGER:
        return _eager(x, weights, (gate_up_proj, down_proj), dispatch, eager.int8_linear)
    check_kernel(x)
    from sevenfold.ops.quantised import triton_mixture

    plan = (dispatch.choice, dispatch.row, dispatch.rows_per_expert)
    return triton_mixture.int8_mixture(x, weights, *gate_up_proj, *down_proj, *plan)


def fp8_mixture(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Fp8Rows,
    down_proj: Fp8Rows,
    dispatch: Dispatch,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """Send each token through its experts, and sum what they make of it by weight; all in fp8.

        int8_mixture with fp8_linear's products: tokens and hidden rows are rounded row by row

    Args:
        x: [T, D], bf16, fp16 or fp32.
        weights: [T, k], any floating dtype.
        gate_up_proj: codes [E, 2 F, D] and scale [E, 2 F], W_gate above W_up.
        down_proj: codes [E, D, F] and scale [E, D].
        dispatch: the plan of the tokens' choices.
        impl: as int8_mixture.

    Returns:
        [T, D] in the dtype of x; a dropped choice adds nothing.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: triton is asked for on another device or dtype, the GPU has no fp8, or
            there is no implementation of that name.
    """
    _check(x, weights, (gate_up_proj, down_proj), dispatch, FP8)
    check_fp8_device(x.device)
    if choose_impl("fp8_mixture", impl, default_int8_impl(x), _IMPLS) is Impl.EAGER:
        return _eager(x, weights, (gate_up_proj, down_proj), dispatch, eager.fp8_linear)
    check_kernel(x)
    from sevenfold.ops.quantised import triton_mixture

    plan = (dispatch.choice, dispatch.row, dispatch.rows_per_expert)
    return triton_mixture.fp8_mixture(x, weights, *gate_up_proj, *down_proj, *plan)


def _check(
    x: Tensor,
    weights: Tensor,
    projections: tuple[Int8Rows | Fp8Rows, Int8Rows | Fp8Rows],
    dispatch: Dispatch,
    dtype: torch.dtype,
) -> None:
    E, F2, D = projections[0].codes.shape
    check_shape("x", x, (len(x), D), "[T, D]")
    check_shape("weights", weights, dispatch.row.shape, "[T, k]")
    check_shape("down_proj.codes", projections[1].codes, (E, D, F2 // 2), "[E, D, F]")
    for name, rows in zip(("gate_up_proj", "down_proj"), projections, strict=True):
        check_shape(f"{name}.scale", rows.scale, rows.codes.shape[:2], "[E, N]")
        check_dtype(f"{name}.codes", rows.codes, (dtype,))


def _eager(
    x: Tensor,
    weights: Tensor,
    projections: tuple[Int8Rows | Fp8Rows, Int8Rows | Fp8Rows],
    dispatch: Dispatch,
    product: _Product,
) -> Tensor:
    (gate_up, gate_up_scale), (down, down_scale) = projections
    counts = dispatch.rows_per_expert.tolist()
    parts = []
    for e, rows in enumerate(gather_rows(x, dispatch).split(counts)):
        if len(rows):
            hidden = swiglu(product(rows, gate_up[e], gate_up_scale[e]))
            parts.append(product(hidden, down[e], down_scale[e]))
    rows = torch.cat(parts) if parts else x.new_zeros(0, x.shape[1])
    return combine(rows, weights.to(rows.dtype), dispatch)
