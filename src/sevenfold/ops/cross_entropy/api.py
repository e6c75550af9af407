"""Cross-entropy of a linear head: the public operator, its checks and the implementation."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.cross_entropy import eager, reference
from sevenfold.ops.precision import autocast, full_precision
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
        weight: [vocab_size, D], dtype of hidden.
        labels: [...] int64, 0 to vocab_size - 1, or IGNORED_LABEL.
        impl: "reference" (all logits at once) or "eager" (by chunks); None takes eager.

    Returns:
        The sum, a scalar, fp32 (fp64 with fp64 inputs); divide by the number of labels for a mean.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: the operator has no implementation of that name.
    """
    D = hidden.shape[-1]
    check_shape("weight", weight, (len(weight), D), "[vocab_size, D]")
    check_shape("labels", labels, hidden.shape[:-1], "hidden's without D")
    check_dtype("weight", weight, (hidden.dtype,))
    check_dtype("labels", labels, (torch.int64,))
    chosen = choose_impl("linear_cross_entropy", impl, Impl.EAGER, (Impl.REFERENCE, Impl.EAGER))
    hidden, weight = autocast(hidden, weight)
    run = reference.forward if chosen is Impl.REFERENCE else eager.forward
    with full_precision(hidden.device):
        return run(hidden.reshape(-1, D), weight, labels.reshape(-1))
