"""The linear layer without bias, and the choice of its matrix product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.checks import check_dtype, choose_impl
from sevenfold.ops.few_rows import logits_on_device, suits_device_rows, suits_device_weights
from sevenfold.ops.linear import mkl, onednn, products
from sevenfold.ops.numba_rules import suits_numba
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.ONEDNN, Impl.NUMBA)
_MATVEC_ROWS = 8  # more rows than these are faster as a matrix product
# From 32 MB on, glibc takes fresh memory for each result; numba's is asked for in huge pages.
_LARGE_ELEMENTS = 2**23
# Multiplications from which tiles repay the start of their loops: 256 tokens of 256 by 256.
_TILED_PRODUCTS = 2**24


def default_linear_impl(x: Tensor, weight: Tensor) -> Impl:
    """Return the implementation that linear takes, on a CPU in fp32; elsewhere it is eager.

    numba for a few rows in inference mode; then eager where MKL is the fastest. Elsewhere numba for
    results of 32 MB and more without a gradient, and for 2^24 multiplications and more with one;
    else oneDNN. Eager too where autocast is on, which works on PyTorch's own operators.
    """
    if x.dtype is not torch.float32 or x.device.type != "cpu" or x.numel() == 0:
        return Impl.EAGER
    if torch.is_autocast_enabled("cpu"):
        return Impl.EAGER
    if not torch.compiler.is_compiling() and _pays_by_numba(x, weight):
        return Impl.NUMBA
    return Impl.ONEDNN if onednn.AVAILABLE and not mkl.FASTEST else Impl.EAGER


def _pays_by_numba(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // x.shape[-1]
    if rows <= _MATVEC_ROWS and torch.is_inference_mode_enabled():
        return True
    if mkl.FASTEST:
        return False
    if _needs_gradient(x, weight):
        return x.numel() * len(weight) >= _TILED_PRODUCTS
    return rows * len(weight) >= _LARGE_ELEMENTS


def linear(x: Tensor, weight: Tensor, *, impl: Impl | str | None = None) -> Tensor:
    """Multiply by a weight matrix.

        y = x W^T

    Args:
        x: [..., K], any floating dtype.
        weight: [N, K], dtype of x (under autocast both are cast).
        impl: "eager" (torch.nn.functional.linear), "onednn" or "numba" (fp32 on a CPU); None takes
            default_linear_impl. A named one never falls back.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: onednn or numba is asked for with another dtype than fp32.
        UnsupportedError: there is no implementation of that name.
    """
    if impl is None:
        chosen = default_linear_impl(x, weight)
    else:
        chosen = choose_impl("linear", impl, Impl.EAGER, _IMPLS)
    if chosen is Impl.EAGER or x.numel() == 0:
        return F.linear(x, weight)
    check_dtype("x", x, (torch.float32,))
    check_dtype("weight", weight, (torch.float32,))
    if chosen is Impl.ONEDNN:
        return onednn.linear(x, weight)
    # numba takes half a second to import: only who needs it waits for it.
    from sevenfold.ops.linear import matvec, tiled

    few = x.numel() <= _MATVEC_ROWS * x.shape[-1]
    if few and not _needs_gradient(x, weight):
        return matvec.linear(x, weight)
    return tiled.linear(x, weight)


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


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


def room_for_logits(num_rows: int, weight: Tensor) -> Tensor | None:
    """Take the memory of logits before the work that comes before them.

    Args:
        num_rows: T, tokens.
        weight: [vocab_size, D].

    Returns:
        [T, vocab_size] fp32 for head_logits_into, where that pays: for 32 MB and more, in fp32 on
        a CPU without a gradient; else None.
    """
    large = num_rows * len(weight) >= _LARGE_ELEMENTS
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if not large or not plain or not suits_numba(weight):
        return None
    from sevenfold.ops.compiled import touched

    return touched(num_rows, len(weight))


def head_logits_into(room: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Write head_logits of hidden [..., D] into what room_for_logits returned."""
    products.add_matmul_nt(room, hidden.flatten(0, -2), products.prepare(weight), keep=False)
    return room.view(*hidden.shape[:-1], len(weight))


def _at_least_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    if hidden.dtype in (torch.float32, torch.float64):
        return linear(hidden, weight)
    if hidden.device.type == "cuda":
        if suits_device_rows(hidden) and suits_device_weights((weight,)):
            rows = logits_on_device(hidden.flatten(0, -2).contiguous(), weight)
            return rows.view(*hidden.shape[:-1], len(weight))
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
        [N, K] fp32 (fp64 with fp64 inputs), its rows or its columns contiguous.
    """
    if default_linear_impl(dy.t(), x.t()) is Impl.ONEDNN:
        return onednn.weight_grad(dy, x)
    return head_logits(dy.t(), x.t())
