"""The router's choice in one pass each way.

Weights that are divided by their sum are the softmax over the chosen logits alone, so neither pass
needs the other experts' probabilities.
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


@launched
@triton.jit
def _forward_kernel(
    logits_ptr, weights_ptr, experts_ptr, num_tokens, E,
    K: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = (token < num_tokens) & (expert < E)
    logits = tl.load(logits_ptr + token * E + expert, inside, 0.0)
    logits = tl.where(expert < E, logits, float("-inf"))
    largest = tl.max(logits, 1, keep_dims=True)
    left, total = logits, tl.zeros((TOKENS, 1), tl.float32)
    for j in tl.static_range(K):
        # Never beyond the last expert, not even where all logits are NaN.
        chosen = tl.minimum(tl.argmax(left, 1, keep_dims=True), E - 1)
        tl.store(experts_ptr + token * K + j, chosen.to(tl.int64), token < num_tokens)
        total += tl.exp(tl.max(left, 1, keep_dims=True) - largest)
        left = tl.where(expert == chosen, float("-inf"), left)
    left = logits
    for j in tl.static_range(K):
        chosen = tl.argmax(left, 1, keep_dims=True)
        weight = tl.exp(tl.max(left, 1, keep_dims=True) - largest) / total
        tl.store(weights_ptr + token * K + j, weight, token < num_tokens)
        left = tl.where(expert == chosen, float("-inf"), left)


@launched
@triton.jit
def _backward_kernel(
    dweights_ptr, weights_ptr, experts_ptr, dlogits_ptr, num_tokens, E,
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
    tl.store(dlogits_ptr + token * E + expert, dlogits, inside & (expert < E))


def _tile(E: int) -> tuple[int, int]:
    experts = next_power_of_2(E)
    return max(1, _TILE_ELEMENTS // experts), experts


@operator("sevenfold::route")
def route(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """Weights and experts; arguments and results as in the public operator."""
    weights, experts = _results(logits, num_chosen)
    T, E = logits.shape
    tokens, columns = _tile(E)
    if T:
        _forward_kernel[(cdiv(T, tokens),)](
            logits.contiguous(), weights, experts, T, E,
            K=num_chosen, TOKENS=tokens, EXPERTS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return weights, experts


@operator("sevenfold::route_backward")
def route_backward(dweights: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """The gradient of the logits."""
    T, k = weights.shape
    dlogits = weights.new_empty(T, num_experts)
    tokens, columns = _tile(num_experts)
    if T:
        _backward_kernel[(cdiv(T, tokens),)](
            dweights.contiguous(), weights, experts, dlogits, T, num_experts,
            K=k, TOKENS=tokens, EXPERTS=columns, num_warps=_WARPS,
        )  # fmt: skip
    return dlogits


@route.register_fake
def _results(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    shape, device = (logits.shape[0], num_chosen), logits.device
    return logits.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=device)


route_backward.register_fake(
    lambda dweights, weights, experts, num_experts: weights.new_empty(weights.shape[0], num_experts)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)
    ctx.num_experts = inputs[0].shape[1]


def _grads(ctx: Any, dweights: Tensor, dexperts: Any) -> tuple[Tensor, None]:
    return route_backward(dweights, *ctx.saved_tensors, ctx.num_experts), None


route.register_autograd(_grads, setup_context=_save)
