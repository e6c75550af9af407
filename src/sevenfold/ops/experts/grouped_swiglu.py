"""SwiGLU experts on rows that are sorted by expert already: the public operator."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.experts.api import grouped_linear
from sevenfold.ops.experts.mixture import triton_refusal
from sevenfold.ops.precision import autocast
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.TRITON)


def grouped_swiglu(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    ends: Tensor,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run each expert on its rows: mixture without the ways there and back.

        y_r = W_down,e (silu(W_gate,e x_r) * W_up,e x_r)    for the rows r of expert e

    Args:
        x: [R, D], sorted by expert, any floating dtype; under autocast all are cast.
        gate_up_proj: [E, 2 F, D] in the dtype of x, W_gate above W_up.
        down_proj: [E, D, F] in the dtype of x.
        ends: [E] int32, where each expert's rows end, the last at R; an expert may have none.
        impl: "eager" (grouped_linear and swiglu, each with its default) or "triton" (one operator
            that keeps no hidden rows for its backward, bf16 on a GPU); None takes triton where it
            can run. A named one never falls back.

    Returns:
        [R, D] in the dtype of x.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: triton is asked for on another device, dtype or width, or there is no
            implementation of that name.
    """
    E, F2, D = gate_up_proj.shape
    check_shape("x", x, (len(x), D), "[R, D]")
    check_shape("down_proj", down_proj, (E, D, F2 // 2), "[E, D, F]")
    check_shape("ends", ends, (E,), "[E]")
    check_dtype("ends", ends, (torch.int32,))
    refusal = triton_refusal(x, gate_up_proj)
    default = Impl.EAGER if refusal else Impl.TRITON
    chosen = choose_impl("grouped_swiglu", impl, default, _IMPLS)
    x, gate_up_proj, down_proj = autocast(x, gate_up_proj, down_proj)
    for name, projection in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_dtype(name, projection, (x.dtype,))
    if chosen is Impl.EAGER:
        rows_per_expert = torch.diff(ends, prepend=ends.new_zeros(1))
        hidden = swiglu(grouped_linear(x, gate_up_proj, rows_per_expert))
        return grouped_linear(hidden, down_proj, rows_per_expert)
    if refusal:
        raise UnsupportedError(refusal)
    from sevenfold.ops.experts import triton_grouped_swiglu

    return triton_grouped_swiglu.grouped_swiglu(x, gate_up_proj, down_proj, ends)[0]
