"""The linear layer without bias, and the choice of its matrix product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.checks import check_dtype, choose_impl
from sevenfold.ops.linear import onednn
from sevenfold.ops.types import Impl


def default_linear_impl(device_type: str, dtype: torch.dtype) -> Impl:
    """Return the implementation that linear takes: oneDNN for fp32 on a CPU, else eager."""
    if device_type == "cpu" and dtype == torch.float32 and onednn.is_available():
        return Impl.ONEDNN
    return Impl.EAGER


def linear(x: Tensor, weight: Tensor, *, impl: Impl | str | None = None) -> Tensor:
    """Multiply by a weight matrix.

        y = x W^T

    Args:
        x: [..., K], any floating dtype.
        weight: [N, K], dtype of x (under autocast both are cast).
        impl: "eager" (torch.nn.functional.linear) or "onednn" (fp32 on a CPU); None takes
            default_linear_impl. A named one never falls back.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: onednn is asked for with another dtype than fp32.
        UnsupportedError: there is no implementation of that name.
    """
    # Autocast works on torch's own operators, so it decides the product where it is on.
    cast = torch.is_autocast_enabled(x.device.type)
    default = Impl.EAGER if cast else default_linear_impl(x.device.type, x.dtype)
    chosen = choose_impl("linear", impl, default, (Impl.EAGER, Impl.ONEDNN))
    if chosen is Impl.EAGER or x.numel() == 0:
        return F.linear(x, weight)
    check_dtype("x", x, (torch.float32,))
    check_dtype("weight", weight, (torch.float32,))
    return onednn.linear(x, weight)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a head's weight, accumulating and returning at least fp32 whatever the inputs.

        z = h W^T

    Args:
        hidden: [..., D], bf16, fp16, fp32 or fp64.
        weight: [vocab_size, D], dtype of hidden.

    Returns:
        [..., vocab_size] fp32 (fp64 with fp64 inputs).

    Source: arXiv 2506.13585 (MiniMax-M1) section 3.2: an LM head below fp32 made training and
        inference probabilities disagree.
    """
    if hidden.dtype in (torch.float32, torch.float64):
        return linear(hidden, weight)
    if hidden.device.type == "cuda":
        z = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return z.view(*hidden.shape[:-1], -1)
    return linear(hidden.float(), weight.float())
