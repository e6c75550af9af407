"""Dispatch by PyTorch: both ways are gathers, so both are deterministic on any device."""

from typing import Any

import torch
from torch import Tensor


def plan(experts: Tensor, num_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The plan's choice, row and rows_per_expert; arguments as in the public operator."""
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
    return order, row.view(T, k), chosen.to(torch.int32)


def gather_rows(x: Tensor, token: Tensor, row: Tensor) -> Tensor:
    """x[token]; row is the way back, for the gradient."""
    return _GatherRows.apply(x, token, row)


def sum_rows(rows: Tensor, row: Tensor) -> Tensor:
    """The sum of each token's rows, without a gradient."""
    parts = _choices(rows, row)
    return parts[0] if len(parts) == 1 else sum(parts[1:], start=parts[0])


def combine(rows: Tensor, weights: Tensor, token: Tensor, row: Tensor) -> Tensor:
    """The weighted sum of each token's rows."""
    return _Combine.apply(rows, weights, token, row)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.row = row
        return x[token]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grads[0], ctx.row), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.token, ctx.row = token, row
        first, *others = _choices(rows, row)
        y = first.mul_(weights[:, :1])
        for j, choice in enumerate(others, start=1):
            y = torch.addcmul(y, choice, weights[:, j : j + 1])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (dy,) = grads
        rows, weights = ctx.saved_tensors
        R, k = len(rows), weights.shape[1]
        row_weight = weights.new_zeros(R + 1)
        row_weight[ctx.row.flatten()] = weights.flatten()
        drows = dy[ctx.token].mul_(row_weight[:R, None])
        choices = _choices(rows, ctx.row)
        dweights = torch.stack([(choices[j] * dy).sum(-1) for j in range(k)], dim=1)
        return drows, dweights, None, None


def _choices(rows: Tensor, row: Tensor) -> list[Tensor]:
    """The row of each token's first choice, second choice, ...; zeros for a dropped one."""
    R, k = len(rows), row.shape[1]
    if row.numel() == R:
        return [rows[row[:, j]] for j in range(k)]
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return [padded[row[:, j]] for j in range(k)]
