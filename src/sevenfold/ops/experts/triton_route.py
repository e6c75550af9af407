"""The router's choice in one pass each way, and beside it the sums that its statistics need.

Weights that are divided by their sum are the softmax over the chosen logits alone, so the choice
needs no other expert's probability. Each program sums over its own tokens and writes one row, so
that sums have one order.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_launched import launched

_TILE_ELEMENTS, _WARPS = 1024, 4
# Parts take some 8 T E^2 / 1024 bytes, which a layer keeps to the end of its micro-batch: those of
# more experts are summed at once, by a launch of its own.
_MANY_EXPERTS = 64


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    logits_ptr, weights_ptr, experts_ptr, totals_ptr, num_tokens, E,
    K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = (token < num_tokens) & (expert < E)
    logits = tl.load(logits_ptr + token * E + expert, inside, 0.0)
    logits = tl.where(expert < E, logits, float("-inf"))
    largest = tl.max(logits, 1, keep_dims=True)
    if totals_ptr is not None:
        p = tl.exp(logits - largest)
        whole = tl.sum(p, 1, keep_dims=True)
        square = largest + tl.log(whole)
        square *= square
        place = totals_ptr + tl.program_id(0).to(tl.int64) * (2 * E + 1)
        column, is_expert = tl.arange(0, EXPERTS), tl.arange(0, EXPERTS) < E
        tl.store(place + column, tl.sum(tl.where(inside, p / whole, 0.0), 0), is_expert)
        tl.store(place + 2 * E, tl.sum(tl.sum(tl.where(token < num_tokens, square, 0.0), 1), 0))
        count = tl.zeros((TOKENS, EXPERTS), tl.float32)
    left, total = logits, tl.zeros((TOKENS, 1), tl.float32)
    for j in tl.static_range(K):
        # Never beyond the last expert, not even where all logits are NaN.
        chosen = tl.minimum(tl.argmax(left, 1, keep_dims=True), E - 1)
        tl.store(experts_ptr + token * K + j, chosen.to(tl.int64), token < num_tokens)
        total += tl.exp(tl.max(left, 1, keep_dims=True) - largest)
        if totals_ptr is not None:
            count += tl.where((expert == chosen) & (token < num_tokens), 1.0, 0.0)
        left = tl.where(expert == chosen, float("-inf"), left)
    if totals_ptr is not None:
        tl.store(place + E + column, tl.sum(count, 0), is_expert)
    left = logits
    for j in tl.static_range(K):
        chosen = tl.argmax(left, 1, keep_dims=True)
        weight = tl.exp(tl.max(left, 1, keep_dims=True) - largest) / total
        tl.store(weights_ptr + token * K + j, weight, token < num_tokens)
        left = tl.where(expert == chosen, float("-inf"), left)


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    dweights_ptr, weights_ptr, experts_ptr, logits_ptr, dtotals_ptr, dlogits_ptr,
    num_tokens, E, part_stride, column_stride,
    K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert, inside = tl.arange(0, EXPERTS)[None, :], token < num_tokens
    dlogits = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for j in tl.static_range(K):
        dweight = tl.load(dweights_ptr + token * K + j, inside, 0.0)
        # The mean of differences: less rounding than the difference from the mean.
        above = tl.zeros((TOKENS, 1), tl.float32)
        for i in tl.static_range(K):
            other = tl.load(dweights_ptr + token * K + i, inside, 0.0)
            above += tl.load(weights_ptr + token * K + i, inside, 0.0) * (dweight - other)
        weight = tl.load(weights_ptr + token * K + j, inside, 0.0)
        chosen = tl.load(experts_ptr + token * K + j, inside, -1)
        dlogits += tl.where(expert == chosen, weight * above, 0.0)
    if dtotals_ptr is not None:
        logits = tl.load(logits_ptr + token * E + expert, inside & (expert < E), 0.0)
        logits = tl.where(expert < E, logits, float("-inf"))
        largest = tl.max(logits, 1, keep_dims=True)
        p = tl.exp(logits - largest)
        whole = tl.sum(p, 1, keep_dims=True)
        p /= whole
        place = dtotals_ptr + tl.program_id(0).to(tl.int64) * part_stride
        dp = tl.load(place + expert * column_stride, expert < E, 0.0)
        dsquare = tl.load(place + 2 * E * column_stride)
        rest = 2 * dsquare * (largest + tl.log(whole)) - tl.sum(dp * p, 1, keep_dims=True)
        dlogits += p * (dp + rest)
    tl.store(dlogits_ptr + token * E + expert, dlogits, inside & (expert < E))


def _tile(E: int) -> tuple[int, int]:
    experts = next_power_of_2(E)
    return max(1, _TILE_ELEMENTS // experts), experts


@operator("sevenfold::route")
def route(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """Weights and experts; arguments and results as in the public operator."""
    weights, experts = _results(logits, num_chosen)
    _run(logits, weights, experts, None)
    return weights, experts


@operator("sevenfold::route_and_count")
def route_and_count(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, experts and totals; arguments and results as in the public operator."""
    results = _counted_results(logits, num_chosen)
    _run(logits, *results)
    return results


def in_few_parts(weights: Tensor, experts: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Results of route_and_count, whose totals take no more memory than the logits."""
    many = totals.shape[1] // 2 > _MANY_EXPERTS
    return weights, experts, totals.sum(0, keepdim=True) if many else totals


def _run(logits: Tensor, weights: Tensor, experts: Tensor, totals: Tensor | None) -> None:
    T, E = logits.shape
    tokens, columns = _tile(E)
    if T:
        _forward_kernel[(cdiv(T, tokens),)](
            logits.contiguous(), weights, experts, totals, T, E,
            K=weights.shape[1], TOKENS=tokens, EXPERTS=columns, num_warps=_WARPS,
        )  # fmt: skip


@operator("sevenfold::route_backward")
def route_backward(dweights: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """The gradient of the logits."""
    dlogits = weights.new_empty(len(weights), num_experts)
    _run_backward(dweights, weights, experts, None, None, dlogits)
    return dlogits


@operator("sevenfold::route_and_count_backward")
def route_and_count_backward(
    dweights: Tensor, dtotals: Tensor, weights: Tensor, experts: Tensor, logits: Tensor
) -> Tensor:
    """The gradient of the logits, of both what was chosen and what was summed."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run_backward(dweights, weights, experts, logits.contiguous(), dtotals, dlogits)
    return dlogits


def _run_backward(
    dweights: Tensor, weights: Tensor, experts: Tensor,
    logits: Tensor | None, dtotals: Tensor | None, dlogits: Tensor,
) -> None:  # fmt: skip
    (T, E), (tokens, columns) = dlogits.shape, _tile(dlogits.shape[1])
    # The gradient of a sum over parts is one row for all of them: its strides say so.
    strides = (0, 0) if dtotals is None else dtotals.stride()
    if T:
        _backward_kernel[(cdiv(T, tokens),)](
            dweights.contiguous(), weights, experts, logits, dtotals, dlogits, T, E, *strides,
            K=weights.shape[1], TOKENS=tokens, EXPERTS=columns, num_warps=_WARPS,
        )  # fmt: skip


@route.register_fake
def _results(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    shape, device = (logits.shape[0], num_chosen), logits.device
    return logits.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=device)


@route_and_count.register_fake
def _counted_results(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    totals = logits.new_empty(cdiv(T, _tile(E)[0]), 2 * E + 1)
    return *_results(logits, num_chosen), totals


route_and_count_backward.register_fake(
    lambda dweights, dtotals, weights, experts, logits: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    )
)
route_backward.register_fake(
    lambda dweights, weights, experts, num_experts: weights.new_empty(weights.shape[0], num_experts)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)
    ctx.num_experts = inputs[0].shape[1]


def _grads(ctx: Any, dweights: Tensor, dexperts: Any) -> tuple[Tensor, None]:
    return route_backward(dweights, *ctx.saved_tensors, ctx.num_experts), None


def _save_counted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, experts, _ = output
    ctx.mark_non_differentiable(experts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weights, experts, inputs[0])


def _counted_grads(
    ctx: Any, dweights: Tensor | None, dexperts: None, dtotals: Tensor | None
) -> tuple[Tensor | None, None]:
    weights, experts, logits = ctx.saved_tensors
    if dtotals is None:
        if dweights is None:
            return None, None
        return route_backward(dweights, weights, experts, logits.shape[1]), None
    dweights = torch.zeros_like(weights) if dweights is None else dweights
    return route_and_count_backward(dweights, dtotals, *ctx.saved_tensors), None


route.register_autograd(_grads, setup_context=_save)
route_and_count.register_autograd(_counted_grads, setup_context=_save_counted)
