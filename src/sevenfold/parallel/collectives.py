"""Collectives with gradients; each function names what passes forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from sevenfold.parallel.exchange import Arrival, Collective, Exchange


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand the same x to computations that each rank does in part.

    forward: x        backward: sum over ranks of dx
    """
    return _CopyToRanks.apply(x, group)


def sum_of_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum what each rank computed in part; all ranks go on with the same sum.

    forward: sum over ranks of x        backward: dy

    Args:
        x: nobody else's: without a gradient the sum takes its place.
        group: the ranks.
    """
    if not torch.is_grad_enabled() and x.is_contiguous():
        return sum_in_place(x, group)
    return _SumOfParts.apply(x, group)


def sum_for_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum parts of a value that each rank then uses in part.

    forward: sum over ranks of x        backward: sum over ranks of dy
    """
    return copy_to_ranks(sum_of_parts(x, group), group)


def sum_in_place(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum x over the ranks where it lies, without a gradient; returns it."""
    dist.all_reduce(x, group=group)
    return x


def split_tokens(x: Tensor, group: dist.ProcessGroup, stretches: int) -> Tensor:
    """Take own tokens of what all ranks hold: the rank's part of each of some equal stretches.

    forward: own part of x        backward: dx of all ranks, joined

    Args:
        x: [T, ...], the same on all ranks; ranks * stretches divide T.
        group: the ranks.
        stretches: into which x is cut first.

    Returns:
        [T / ranks, ...].
    """
    return _SplitTokens.apply(x, group, stretches)


def join_tokens(x: Tensor, group: dist.ProcessGroup, stretches: int) -> Tensor:
    """Join what ranks computed for their own tokens; the inverse of split_tokens.

    forward: x of all ranks, joined        backward: own part of dy
    """
    return _JoinTokens.apply(x, group, stretches)


def gather_rows_of_ranks(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Hand every rank the rows of all, to compute in part what they become.

    forward: rows of all ranks, in their order        backward: sum over ranks of dy, own rows

    Args:
        rows: [n, D].
        sizes: n of each rank.
        group: the ranks.
    """
    return _GatherRows.apply(rows, sizes, group)


def sum_rows_of_ranks(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sum what each rank computed in part for the rows of all, and keep the own rows.

    forward: sum over ranks of x, own rows        backward: dy of all ranks, in their order
    """
    return _SumRows.apply(rows, sizes, group)


class Flight:
    """An all-to-all under way, and the one that brings its gradient back.

    What lies between begin_exchange and end_exchange runs beside it. Backward autograd takes nodes
    in the reverse of their creation, so the same work runs beside the gradient's exchange.

    Args:
        sent, received: rows for and from each rank.
        exchange: how.
    """

    def __init__(self, sent: list[int], received: list[int], exchange: Exchange) -> None:
        self.sent, self.received, self.exchange = sent, received, exchange
        self.arrival: Arrival | None = None
        self.rows = torch.empty(0)

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows; what is returned is filled when finish has been called."""
        self.rows, self.arrival = self.exchange.start(rows.contiguous(), sent, received)
        return self.rows

    def finish(self) -> Tensor:
        """Wait for what start began: on a GPU its stream does, and the host goes on."""
        if self.arrival is not None:
            self.arrival.wait()
        rows, self.arrival, self.rows = self.rows, None, torch.empty(0)
        return rows


def begin_exchange(rows: Tensor, flight: Flight) -> Tensor:
    """Send each rank its rows [sum(sent), ...], for rank 0 first; end_exchange takes the result.

    A flight that was started before has sent them: here it gets its gradient.
    """
    return _Begin.apply(rows, flight)


def end_exchange(underway: Tensor, flight: Flight) -> Tensor:
    """Return [sum(received), ...], from rank 0 first."""
    return _End.apply(underway, flight)


def exchange_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send each rank its rows: an all-to-all, whose gradient goes the same way back.

    Args:
        rows: [sum(sent), ...], for rank 0 first.
        sent, received: rows for and from each rank.
        group: the ranks.

    Returns:
        [sum(received), ...], from rank 0 first.
    """
    flight = Flight(sent, received, Collective(group))
    return end_exchange(begin_exchange(rows, flight), flight)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, stretches: int) -> Tensor:
        ctx.how = (group, stretches)
        return _own_tokens(x, group, stretches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _joined_tokens(grads[0], *ctx.how), None, None


class _JoinTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, stretches: int) -> Tensor:
        ctx.how = (group, stretches)
        return _joined_tokens(x, group, stretches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _own_tokens(grads[0], *ctx.how), None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.how = (sizes, group)
        return _gathered_rows(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _summed_rows(grads[0], *ctx.how), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.how = (sizes, group)
        return _summed_rows(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered_rows(grads[0], *ctx.how), None, None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        if flight.arrival is not None:
            return flight.rows
        return flight.start(rows, flight.sent, flight.received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, underway: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.finish().view_as(underway)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight: Flight = ctx.flight
        flight.start(grads[0], flight.received, flight.sent)
        return grads[0], None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


def _own_tokens(x: Tensor, group: dist.ProcessGroup, stretches: int) -> Tensor:
    size, index = dist.get_world_size(group), dist.get_rank(group)
    return x.unflatten(0, (stretches, size, -1))[:, index].flatten(0, 1).contiguous()


def _joined_tokens(x: Tensor, group: dist.ProcessGroup, stretches: int) -> Tensor:
    size = dist.get_world_size(group)
    gathered = x.new_empty(size, *x.shape)
    dist.all_gather_into_tensor(gathered, x[None].contiguous(), group=group)
    return gathered.unflatten(1, (stretches, -1)).transpose(0, 1).flatten(0, 2)


def _gathered_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Ranks have different numbers of rows, which an all-to-all allows and a gather does not."""
    gathered = rows.new_empty(sum(sizes), *rows.shape[1:])
    copies = rows.repeat(len(sizes), *[1] * (rows.dim() - 1))
    dist.all_to_all_single(gathered, copies, sizes, [len(rows)] * len(sizes), group=group)
    return gathered


def _summed_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    own = sizes[dist.get_rank(group)]
    parts = rows.new_empty(len(sizes), own, *rows.shape[1:])
    received = [own] * len(sizes)
    dist.all_to_all_single(parts.flatten(0, 1), rows.contiguous(), received, sizes, group=group)
    return parts.sum(0)
