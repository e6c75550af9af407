"""Cross-entropy of a linear head: the public operator, its checks and the implementation."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.cross_entropy import eager, reference
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
        impl: "reference" (all logits at once), "eager" (by chunks) or "triton" (by chunks, loss and
            gradient of the logits in one pass in place; bf16, fp16 or fp32 on a GPU); None takes
            default_cross_entropy_impl. A named one never falls back.

    Returns:
        The sum, a scalar, fp32 (fp64 with fp64 inputs); divide by the number of labels for a mean.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: triton is asked for on another device or dtype, or the operator has no
            implementation of that name.
    """
    D = hidden.shape[-1]
    hidden, weight = autocast(hidden, weight)
    check_shape("weight", weight, (len(weight), D), "[vocab_size, D]")
    check_shape("labels", labels, hidden.shape[:-1], "hidden's without D")
    check_dtype("weight", weight, (hidden.dtype,))
    check_dtype("labels", labels, (torch.int64,))
    default = default_cross_entropy_impl(hidden)
    chosen = choose_impl("linear_cross_entropy", impl, default, tuple(_RUNS))
    if chosen is Impl.TRITON:
        check_on_gpu("hidden", hidden)
    with full_precision(hidden.device):
        return _RUNS[chosen](hidden.reshape(-1, D), weight, labels.reshape(-1))


def default_cross_entropy_impl(hidden: Tensor) -> Impl:
    """Return what linear_cross_entropy takes: triton for bf16, fp16, fp32 on a GPU, else eager."""
    return Impl.TRITON if runs_on_gpu(hidden) else Impl.EAGER


def _triton(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from sevenfold.ops.cross_entropy import triton_cross_entropy

    return triton_cross_entropy.forward(hidden, weight, labels)


_RUNS = {Impl.REFERENCE: reference.forward, Impl.EAGER: eager.forward, Impl.TRITON: _triton}
