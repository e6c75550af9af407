"""SwiGLU's elementwise part: the public operator, its checks and the implementation."""

from torch import Tensor

from sevenfold.ops.checks import choose_impl
from sevenfold.ops.swiglu import eager
from sevenfold.ops.triton_rules import check_on_gpu, runs_on_gpu
from sevenfold.ops.types import Impl


def default_swiglu_impl(gate_up: Tensor) -> Impl:
    """Return what swiglu takes: triton for bf16, fp16 and fp32 on a GPU, else eager."""
    return Impl.TRITON if runs_on_gpu(gate_up) else Impl.EAGER


def swiglu(gate_up: Tensor, *, impl: Impl | str | None = None) -> Tensor:
    """Gate the second half of the channels by the SiLU of the first half.

        y = silu(gate) * up, with gate_up = [gate, up]

    Args:
        gate_up: [..., 2 F], any floating dtype.
        impl: "eager" or "triton" (one pass each way); None takes default_swiglu_impl. A named one
            never falls back.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: the last size is odd.
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.

    Source: arXiv 2002.05202.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last size, got {gate_up.shape[-1]}")
    known = (Impl.EAGER, Impl.TRITON)
    if choose_impl("swiglu", impl, default_swiglu_impl(gate_up), known) is Impl.EAGER:
        return eager.swiglu(gate_up)
    check_on_gpu("gate_up", gate_up)
    from sevenfold.ops.swiglu import triton_swiglu

    return triton_swiglu.swiglu(gate_up)
