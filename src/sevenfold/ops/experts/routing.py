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
    _check(logits, num_chosen)
    if _choose("route", logits, impl) is Impl.EAGER:
        return _route(logits.softmax(-1), num_chosen)
    from sevenfold.ops.experts import triton_route

    return triton_route.route(logits, num_chosen)


def route_and_count(
    logits: Tensor, num_chosen: int, *, impl: Impl | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose as route does, and sum over the tokens what a router's statistics are made of.

        totals = sum_t [p_t, how often t chose each expert, logsumexp(logits_t)^2]

    Args:
        logits, num_chosen: as route's.
        impl: as route's; "triton" takes the sums in the same pass each way.

    Returns:
        weights and experts as route's, and totals [P, 2 E + 1] in the dtype of logits: P parts,
        whose sum is meant. P depends on T and E alone. The counts take no gradient.

    Raises:
        ValueError, TypeError, UnsupportedError: as route.
    """
    _check(logits, num_chosen)
    if _choose("route_and_count", logits, impl) is Impl.TRITON:
        from sevenfold.ops.experts import triton_route

        return triton_route.in_few_parts(*triton_route.route_and_count(logits, num_chosen))
    probabilities = logits.softmax(-1)
    weights, experts = _route(probabilities, num_chosen)
    # A comparison, for torch.bincount makes the host wait for a GPU.
    every = torch.arange(logits.shape[1], device=logits.device)
    chosen = (experts.flatten()[:, None] == every).sum(0, keepdim=True).to(logits.dtype)
    squares = torch.logsumexp(logits, dim=-1, keepdim=True).square().sum(0, keepdim=True)
    return weights, experts, torch.cat([probabilities.sum(0, keepdim=True), chosen, squares], 1)


def _route(probabilities: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    largest, experts = probabilities.topk(num_chosen, dim=-1)
    return largest / largest.sum(-1, keepdim=True), experts


def _check(logits: Tensor, num_chosen: int) -> None:
    check_dtype("logits", logits, (torch.float32, torch.float64))
    if not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"num_chosen must be from 1 to {logits.shape[1]}, got {num_chosen}")


def _choose(op: str, logits: Tensor, impl: Impl | str | None) -> Impl:
    chosen = choose_impl(op, impl, default_route_impl(logits), (Impl.EAGER, Impl.TRITON))
    if chosen is Impl.TRITON:
        check_on_gpu("logits", logits)
        check_width("E", logits.shape[1], _MAX_TRITON_EXPERTS)
    return chosen
