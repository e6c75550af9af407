"""Which token goes to which expert's rows, and the way back; both ways are gathers, so both are
deterministic on any device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The rows of all experts, sorted by expert; T tokens with k choices each, R rows.

    token [R]: the token that each row comes from.
    row [T, k]: where each choice stands among the rows, R for a choice that was dropped.
    rows_per_expert [E]: int32; they sum to R.
    """

    token: Tensor
    row: Tensor
    rows_per_expert: Tensor


def plan_dispatch(experts: Tensor, num_experts: int, capacity: int | None) -> Dispatch:
    """Sort the tokens' choices by expert, and drop what exceeds the capacity.

    Choices keep the order of the tokens within an expert, so a choice is dropped because of earlier
    tokens only.

    Args:
        experts: [T, k] int64, the experts that each token chose.
        num_experts: E.
        capacity: rows that one expert takes at most; None drops nothing.

    Returns:
        The plan.

    Source: token drop as in arXiv 2006.16668 (GShard).
    """
    T, k = experts.shape
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)  # [T k] choices by expert
    chosen = torch.bincount(flat, minlength=num_experts)
    if capacity is not None:
        first = torch.cumsum(chosen, 0) - chosen
        place = torch.arange(T * k, device=flat.device) - first[flat[order]]
        order = order[place < capacity]
        chosen = chosen.clamp(max=capacity)
    row = torch.full((T * k,), len(order), device=flat.device)
    row[order] = torch.arange(len(order), device=flat.device)
    return Dispatch(order // k, row.view(T, k), chosen.to(torch.int32))


def gather_rows(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy each token to the rows of its experts.

    Args:
        x: [T, D].
        dispatch: the plan.

    Returns:
        [R, D].
    """
    return _GatherRows.apply(x, dispatch)


def combine(rows: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Sum each token's rows by weight; a dropped choice adds nothing.

        y_t = sum over choices j of weights_tj * rows[row_tj]

    Args:
        rows: [R, D].
        weights: [T, k] in the dtype of rows.
        dispatch: the plan.

    Returns:
        [T, D] in the dtype of rows.
    """
    return _Combine.apply(rows, weights, dispatch)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x[dispatch.token]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = _choices(grads[0], ctx.dispatch)
        return (parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0])), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.dispatch = dispatch
        first, *others = _choices(rows, dispatch)
        y = first.mul_(weights[:, :1])
        for j, choice in enumerate(others, start=1):
            y = torch.addcmul(y, choice, weights[:, j : j + 1])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,) = grads
        rows, weights = ctx.saved_tensors
        dispatch = ctx.dispatch
        R, k = len(rows), weights.shape[1]
        row_weight = weights.new_zeros(R + 1)
        row_weight[dispatch.row.flatten()] = weights.flatten()
        drows = dy[dispatch.token].mul_(row_weight[:R, None])
        choices = _choices(rows, dispatch)
        dweights = torch.stack([(choices[j] * dy).sum(-1) for j in range(k)], dim=1)
        return drows, dweights, None


def _choices(rows: Tensor, dispatch: Dispatch) -> list[Tensor]:
    """The row of each token's first choice, second choice, ...; zeros for a dropped one."""
    R, k = len(rows), dispatch.row.shape[1]
    if dispatch.row.numel() == R:
        return [rows[dispatch.row[:, j]] for j in range(k)]
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return [padded[dispatch.row[:, j]] for j in range(k)]
