"""The router's product: the public operator."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_shape, choose_impl
from sevenfold.ops.linear import linear
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

# A program holds the weights of all experts for some columns.
_MAX_TRITON_EXPERTS = 64


def default_router_impl(x: Tensor, weight: Tensor) -> Impl:
    """Return what router_logits takes: triton for bf16 x on a GPU, else eager.

    Eager too with more than 64 experts, or a weight that is neither bf16 nor fp32.
    """
    return Impl.EAGER if _refusal(x, weight) else Impl.TRITON


def router_logits(x: Tensor, weight: Tensor, *, impl: Impl | str | None = None) -> Tensor:
    """Multiply by a router's weight in fp32 at least, whatever the dtype of x and autocast.

        z = x W^T

    Args:
        x: [T, D], any floating dtype.
        weight: [E, D], any floating dtype.
        impl: "eager" (both operands cast to fp32, or fp64 with fp64 x) or "triton" (reads bf16 x
            once, and is as accurate); None takes default_router_impl. A named one never falls
            back.

    Returns:
        [T, E] fp32, or fp64 with fp64 x.

    Raises:
        ValueError: weight's shape is not [E, D].
        UnsupportedError: triton is asked for on another device, dtype or width, or there is no
            implementation of that name.
    """
    check_shape("weight", weight, (len(weight), x.shape[-1]), "[E, D]")
    known, default = (Impl.EAGER, Impl.TRITON), default_router_impl(x, weight)
    if choose_impl("router_logits", impl, default, known) is Impl.EAGER:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with full_precision(x.device):
            return linear(x.to(dtype), weight.to(dtype))
    refusal = _refusal(x, weight)
    if refusal:
        raise UnsupportedError(refusal)
    from sevenfold.ops.experts import triton_router

    # Exact, and the weight is small; the kernel takes fp32 apart.
    return triton_router.router_logits(x, weight.float())


def _refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why triton cannot compute this, if it cannot."""
    if x.device.type != "cuda" or x.dtype is not torch.bfloat16:
        return f"x must be bf16 on a GPU for impl triton, got {x.dtype} on {x.device}"
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return f"weight must be bf16 or fp32 for impl triton, got {weight.dtype}"
    if len(weight) > _MAX_TRITON_EXPERTS:
        return f"E must be at most {_MAX_TRITON_EXPERTS} for impl triton, got {len(weight)}"
    return None
