"""The router's choice: the public operator."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, choose_impl
from sevenfold.ops.triton_rules import check_on_gpu, check_width, runs_on_gpu
from sevenfold.ops.types import Impl

# A token's logits stay in registers.
_MAX_TRITON_EXPERTS = 4096


def default_route_impl(logits: Tensor) -> Impl:
    """Return what route takes: triton for fp32 on a GPU up to 4,096 experts, else eager."""
    fits = runs_on_gpu(logits) and logits.shape[1] <= _MAX_TRITON_EXPERTS
    return Impl.TRITON if fits else Impl.EAGER


def route(
    logits: Tensor, num_chosen: int, *, impl: Impl | str | None = None
) -> tuple[Tensor, Tensor]:
    """Choose each token's most probable experts, weights summing to 1.

        p = softmax(logits)    weights_j = p_(j) / sum of the chosen p

    Args:
        logits: [T, E], fp32 or fp64.
        num_chosen: k, 1 to E.
        impl: "eager" or "triton" (fp32 on a GPU, one pass each way); None takes
            default_route_impl. A named one never falls back.

    Returns:
        weights [T, k] in the dtype of logits, largest first, and experts [T, k] int64.

    Raises:
        ValueError: num_chosen is out of range.
        TypeError: the logits have another dtype.
        UnsupportedError: triton is asked for on another device, dtype or width, or there is no
            implementation of that name.

    Source: arXiv 2501.08313 (MiniMax-01) section 2.1.
    """
    check_dtype("logits", logits, (torch.float32, torch.float64))
    if not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"num_chosen must be from 1 to {logits.shape[1]}, got {num_chosen}")
    known = (Impl.EAGER, Impl.TRITON)
    if choose_impl("route", impl, default_route_impl(logits), known) is Impl.EAGER:
        probabilities, experts = logits.softmax(-1).topk(num_chosen, dim=-1)
        return probabilities / probabilities.sum(-1, keepdim=True), experts
    check_on_gpu("logits", logits)
    check_width("E", logits.shape[1], _MAX_TRITON_EXPERTS)
    from sevenfold.ops.experts import triton_route

    return triton_route.route(logits, num_chosen)
