"""Cross-entropy of a linear head: the public operator, its checks and the implementation."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.cross_entropy import eager, reference
from sevenfold.ops.numba_rules import check_numba, suits_numba
from sevenfold.ops.precision import autocast, full_precision
from sevenfold.ops.triton_rules import check_on_gpu, runs_on_gpu
from sevenfold.ops.types import Impl

# PyTorch's own convention for a token that has no target.
IGNORED_LABEL = -100


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, impl: Impl | str | None = None
) -> Tensor:
    """Sum the cross-entropy of a linear head over all tokens that have a label.

        loss = sum_t logsumexp(W h_t) - (W h_t)[y_t]    over tokens with a label

    Args:
        hidden: [..., D], bf16, fp16, fp32 or fp64.
        weight: [vocab_size, D], dtype of hidden (under autocast fp32 is cast).
        labels: [...] int64, 0 to vocab_size - 1, or IGNORED_LABEL.
        impl: "reference" (all logits at once), "eager" (by chunks), "numba" (by chunks, products
            by register tiles; fp32 on a CPU) or "triton" (by chunks, loss and gradient of the
            logits in one pass in place; bf16, fp16 or fp32 on a GPU); None takes
            default_cross_entropy_impl. A named one never falls back.

    Returns:
        The sum, a scalar, fp32 (fp64 with fp64 inputs); divide by the number of labels for a mean.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: numba or triton is asked for on another device or dtype, or the operator
            has no implementation of that name.
    """
    D = hidden.shape[-1]
    hidden, weight = autocast(hidden, weight)
    check_shape("weight", weight, (len(weight), D), "[vocab_size, D]")
    check_shape("labels", labels, hidden.shape[:-1], "hidden's without D")
    check_dtype("weight", weight, (hidden.dtype,))
    check_dtype("labels", labels, (torch.int64,))
    default = default_cross_entropy_impl(hidden, weight)
    chosen = choose_impl("linear_cross_entropy", impl, default, tuple(_RUNS))
    if chosen is Impl.TRITON:
        check_on_gpu("hidden", hidden)
    if chosen is Impl.NUMBA:
        check_numba("hidden", hidden)
    with full_precision(hidden.device):
        return _RUNS[chosen](hidden.reshape(-1, D), weight, labels.reshape(-1))


def default_cross_entropy_impl(hidden: Tensor, weight: Tensor) -> Impl:
    """Return what linear_cross_entropy takes, of what autocast makes of its arguments.

    Triton for bf16, fp16, fp32 on a GPU, numba for fp32 on a CPU where a gradient is needed, else
    eager.
    """
    if runs_on_gpu(hidden):
        return Impl.TRITON
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return Impl.NUMBA if trains and suits_numba(hidden, weight) else Impl.EAGER


def _numba(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # numba takes half a second to import: only who trains on a CPU waits for it.
    from sevenfold.ops.cross_entropy import compiled

    return compiled.forward(hidden, weight, labels)


def _triton(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from sevenfold.ops.cross_entropy import triton_cross_entropy

    return triton_cross_entropy.forward(hidden, weight, labels)


_RUNS = {
    Impl.REFERENCE: reference.forward,
    Impl.EAGER: eager.forward,
    Impl.NUMBA: _numba,
    Impl.TRITON: _triton,
}
