"""A whole mixture of SwiGLU experts: the public operator."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_shape, choose_impl
from sevenfold.ops.experts.api import grouped_linear
from sevenfold.ops.experts.dispatch import Dispatch, combine, gather_rows
from sevenfold.ops.numba_rules import suits_numba
from sevenfold.ops.precision import autocast
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.types import Impl

# torch.nn.functional.grouped_mm takes rows of whole 16 bytes: 8 values of bf16.
_TRITON_MULTIPLE = 8
_NUMBA_MULTIPLE = 32  # whole tiles


_IMPLS = (Impl.EAGER, Impl.NUMBA, Impl.TRITON)


def default_mixture_impl(x: Tensor, gate_up_proj: Tensor) -> Impl:
    """Return what mixture takes.

    Triton for bf16 on a GPU with widths that 8 divides, numba for fp32 on a CPU without autocast
    with widths that 32 divides, else eager.
    """
    if _numba_refusal(x, gate_up_proj) is None:
        return Impl.NUMBA
    return Impl.EAGER if triton_refusal(x, gate_up_proj) else Impl.TRITON


def mixture(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    dispatch: Dispatch,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """Send each token through its experts, and sum what they make of it by weight.

        y_t = sum over choices j of w_tj * W_down,e (silu(W_gate,e x_t) * W_up,e x_t),  e = e_tj

    Args:
        x: [T, D], any floating dtype; fp32 is cast under autocast, as the projections are.
        weights: [T, k], any floating dtype.
        gate_up_proj: [E, 2 F, D] in the dtype of x, W_gate above W_up.
        down_proj: [E, D, F] in the dtype of x.
        dispatch: the plan of the tokens' choices.
        impl: "eager" (gather_rows, grouped_linear, swiglu and combine, each with its default),
            "numba" (by blocks of rows, fp32 on a CPU) or "triton" (one operator that waits for
            nothing, bf16 on a GPU); None takes default_mixture_impl. A named one never falls back.

    Returns:
        [T, D] in the dtype of x; a dropped choice adds nothing.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: numba or triton is asked for on another device, dtype or width, or there
            is no implementation of that name.
    """
    E, F2, D = gate_up_proj.shape
    check_shape("x", x, (len(x), D), "[T, D]")
    check_shape("weights", weights, dispatch.row.shape, "[T, k]")
    check_shape("down_proj", down_proj, (E, D, F2 // 2), "[E, D, F]")
    for name, projection in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if _dtype(projection) is not _dtype(x):
            raise TypeError(f"{name} must be {_dtype(x)}, got {projection.dtype}")
    chosen = choose_impl("mixture", impl, default_mixture_impl(x, gate_up_proj), _IMPLS)
    if chosen is Impl.EAGER:
        return _eager(x, weights, gate_up_proj, down_proj, dispatch)
    refusal = (_numba_refusal if chosen is Impl.NUMBA else triton_refusal)(x, gate_up_proj)
    if refusal:
        raise UnsupportedError(refusal)
    plan = (dispatch.choice, dispatch.row, dispatch.rows_per_expert)
    if chosen is Impl.NUMBA:
        # numba takes half a second to import: only who needs it waits for it.
        from sevenfold.ops.experts import numba_mixture

        return numba_mixture.mixture(x, weights, gate_up_proj, down_proj, *plan)
    from sevenfold.ops.experts import triton_mixture

    x, gate_up_proj, down_proj = autocast(x, gate_up_proj, down_proj)
    return triton_mixture.mixture(x, weights, gate_up_proj, down_proj, *plan)[0]


def _eager(
    x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, dispatch: Dispatch
) -> Tensor:
    rows = gather_rows(x, dispatch)
    rows, gate_up_proj, down_proj = autocast(rows, gate_up_proj, down_proj)
    hidden = swiglu(grouped_linear(rows, gate_up_proj, dispatch.rows_per_expert))
    rows = grouped_linear(hidden, down_proj, dispatch.rows_per_expert)
    return combine(rows, weights.to(rows.dtype), dispatch)


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x enters a product: autocast's for fp32 where that is on."""
    device = x.device.type
    if x.dtype is not torch.float32 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _numba_refusal(x: Tensor, gate_up_proj: Tensor) -> str | None:
    """Why numba cannot compute this, if it cannot."""
    if _dtype(x) is not torch.float32 or not suits_numba(gate_up_proj):
        return f"x must be fp32 on a CPU for impl numba, got {_dtype(x)} on {x.device}"
    return _width_refusal(gate_up_proj, _NUMBA_MULTIPLE, Impl.NUMBA)


def triton_refusal(x: Tensor, gate_up_proj: Tensor) -> str | None:
    """Why triton cannot compute this, if it cannot."""
    if x.device.type != "cuda" or _dtype(x) is not torch.bfloat16:
        return f"x must be bf16 on a GPU for impl triton, got {_dtype(x)} on {x.device}"
    return _width_refusal(gate_up_proj, _TRITON_MULTIPLE, Impl.TRITON)


def _width_refusal(gate_up_proj: Tensor, multiple: int, impl: Impl) -> str | None:
    _, F2, D = gate_up_proj.shape
    for name, size in (("D", D), ("F", F2 // 2)):
        if size % multiple:
            return f"{name} must be a multiple of {multiple} for impl {impl}, got {size}"
    return None
