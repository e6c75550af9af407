"""The linear layer without bias, and the choice of its matrix product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.checks import check_dtype, choose_impl
from sevenfold.ops.linear import onednn
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

# Below this MKL's matrix-vector product beats a call of oneDNN (9 against 22 us, 256 x 256).
_SMALL_WEIGHT_ELEMENTS = 65_536


def default_linear_impl(x: Tensor, weight: Tensor) -> Impl:
    """Return the implementation that linear takes: oneDNN for fp32 on a CPU, else eager.

    Eager too where autocast is on, which works on PyTorch's own operators, and for one row with a
    small weight.
    """
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not onednn.AVAILABLE:
        return Impl.EAGER
    one_row = x.numel() == x.shape[-1] and weight.numel() <= _SMALL_WEIGHT_ELEMENTS
    if one_row or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return Impl.EAGER
    return Impl.ONEDNN


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
    if impl is None:
        chosen = default_linear_impl(x, weight)
    else:
        chosen = choose_impl("linear", impl, Impl.EAGER, (Impl.EAGER, Impl.ONEDNN))
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
    with full_precision(hidden.device):
        return _at_least_fp32(hidden, weight)


def _at_least_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.dtype in (torch.float32, torch.float64):
        return linear(hidden, weight)
    if hidden.device.type == "cuda":
        z = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return z.view(*hidden.shape[:-1], -1)
    return linear(hidden.float(), weight.float())


def weight_product(dy: Tensor, x: Tensor) -> Tensor:
    """Multiply for a weight's gradient, accumulating and returning at least fp32.

        dW = dy^T x

    Args:
        dy: [T, N], bf16, fp16, fp32 or fp64.
        x: [T, K], dtype of dy.

    Returns:
        [N, K] fp32 (fp64 with fp64 inputs).
    """
    if default_linear_impl(dy, x) is Impl.ONEDNN:
        return onednn.weight_grad(dy, x)
    return head_logits(dy.t(), x.t())
