"""Collectives with gradients; each function names what passes forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand the same x to computations that each rank does in part.

    forward: x        backward: sum over ranks of dx
    """
    return _CopyToRanks.apply(x, group)


def sum_of_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum what each rank computed in part; all ranks go on with the same sum.

    forward: sum over ranks of x        backward: dy
    """
    return _SumOfParts.apply(x, group)


def sum_for_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum parts of a value that each rank then uses in part.

    forward: sum over ranks of x        backward: sum over ranks of dy
    """
    return copy_to_ranks(sum_of_parts(x, group), group)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join the ranks' tokens along dimension 0.

    forward: x of all ranks, in their order        backward: sum over ranks of dy, own part
    """
    return _GatherTokens.apply(x, group)


def exchange_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send each rank its rows: an all-to-all, whose gradient goes the same way back.

    Args:
        rows: [sum(sent), D], for rank 0 first.
        sent, received: rows for and from each rank.
        group: the ranks.

    Returns:
        [sum(received), D], from rank 0 first.
    """
    return _ExchangeRows.apply(rows, sent, received, group)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, size = group, dist.get_world_size(group)
        gathered = x.new_empty(size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy, size = grads[0].contiguous(), dist.get_world_size(ctx.group)
        dx = dy.new_empty(len(dy) // size, *dy.shape[1:])
        dist.reduce_scatter_tensor(dx, dy, group=ctx.group)
        return dx, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.route = (received, sent, group)
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], *ctx.route), None, None, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


def _exchanged(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
