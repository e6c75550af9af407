"""Softmax attention over a row that several ranks hold: keys and values travel to the queries.

    gather   all keys that a rank's documents need in one exchange, kept for the backward
    ring     rank after rank, each exchange beside the products of the one before; blocks join by
             their log-sum-exp, and the backward fetches them again: a rank never holds the row

A layer whose gathered keys and values would take more than RING_BYTES goes by ring, unless
[parallel] names one. Layers with a window always gather: the keys that they see are few.
Source: arXiv 2310.01889 (ring attention), 2501.08313 section 3.2.1 (varlen ring).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models import Batch
from sevenfold.models.state import KVState, PagedKV, PagedTree
from sevenfold.ops import (
    Block,
    KeptResult,
    attention,
    attention_block,
    attention_block_backward,
    attention_cached,
    attention_kept,
    join_blocks,
    suits_keeping,
)
from sevenfold.parallel.collectives import exchange_rows
from sevenfold.parallel.context.batch import ContextBatch, context_batch
from sevenfold.parallel.context.keys import Part, Step, plan_keys

ContextAttention = Literal["gather", "ring"]

RING_BYTES = 2**30


def chosen_exchange(k: Tensor, v: Tensor, num_ranks: int) -> ContextAttention:
    """Return how keys travel where nothing is named: ring if the row's exceed RING_BYTES.

    Args:
        k, v: of one rank's tokens.
        num_ranks: that hold as many.
    """
    size = num_ranks * (k.numel() + v.numel()) * k.element_size()
    return "ring" if size > RING_BYTES else "gather"


class ContextSoftmax:
    """Stands in for SoftmaxAttention.attend on a context rank."""

    def __init__(
        self,
        scale: float,
        window: int | None,
        group: dist.ProcessGroup,
        exchange: ContextAttention | None,
    ) -> None:
        """Args: scale and window of the layer; group of the context ranks; exchange if named."""
        self.scale, self.window, self.group, self.exchange = scale, window, group, exchange

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: KVState | PagedKV | PagedTree | None,
    ) -> Tensor:
        """Attend q [1, T, H, D] to the keys of its documents, wherever they lie."""
        own = context_batch(batch, state)
        if not own.cut.crosses:
            how = {"lengths": own.lengths, "scale": self.scale, "window": self.window}
            return attention(q, k, v, **how)
        if self.window is not None:
            return self._attend_window(q, k, v, own)
        return self._attend_blocks(q, k, v, own, None)

    def attend_kept(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, kept: KeptResult
    ) -> Tensor:
        """Attend without a window or a state, once for two runs of a block."""
        own = context_batch(batch, None)
        if own.cut.crosses:
            return self._attend_blocks(q, k, v, own, kept)
        if not suits_keeping(q, v, own.lengths):
            return attention(q, k, v, lengths=own.lengths, scale=self.scale)
        return attention_kept(q, k, v, lengths=own.lengths, scale=self.scale, kept=kept)

    def _attend_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, own: ContextBatch, kept: KeptResult | None
    ) -> Tensor:
        exchange = self.exchange or chosen_exchange(k, v, own.cut.num_ranks)
        keys = Exchange(own, self.group, in_turn=exchange == "ring")
        return _BlockAttention.apply(q[0], k[0], v[0], own, keys, self.scale, kept)[None]

    def _attend_window(self, q: Tensor, k: Tensor, v: Tensor, own: ContextBatch) -> Tensor:
        """The last keys before each first piece lie beside its own; one call for each piece."""
        (step,) = plan_keys(own.cut, own.rank, self.window, in_turn=False)
        sizes = _sizes(step.sent), _sizes(step.received)
        fetched = exchange_rows(_outgoing((k[0], v[0]), step), *sizes, self.group)
        fetched = in_order(fetched, step)
        starts = {own.first_pieces[slot].start: read for slot, read in enumerate(step.reads)}
        parts, at = [], 0
        for length in own.lengths:
            tokens = slice(at, at + length)
            pair, read = [k[0, tokens], v[0, tokens]], starts.get(at)
            if read is not None:
                earlier = fetched[slice(*read)].chunk(2, -1)
                pair = [torch.cat(x) for x in zip(earlier, pair, strict=True)]
            parts.append(
                attention_cached(
                    q[:, tokens],
                    pair[0][None],
                    pair[1][None],
                    lengths=(length,),
                    key_lengths=(len(pair[0]),),
                    scale=self.scale,
                    window=self.window,
                )
            )
            at += length
        # Ranks that receive nothing take part in the backward's exchange too.
        return _Tied.apply(torch.cat(parts, 1), fetched)


# Keys and values [T, G, D].
_Pair = tuple[Tensor, Tensor]


class _Underway(NamedTuple):
    rows: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.rows


class Exchange:
    """Sends keys and values, side by side [T, G, 2 D], along a plan, and their gradients back."""

    def __init__(self, own: ContextBatch, group: dist.ProcessGroup, *, in_turn: bool) -> None:
        self.group, self.in_turn = group, in_turn
        self.steps = plan_keys(own.cut, own.rank, None, in_turn=in_turn)

    def start(self, pair: _Pair, step: Step) -> _Underway:
        """Begin one exchange; its rows lie in the plan's order of ranks."""
        outgoing = _outgoing(pair, step)
        if step.is_local:
            return _Underway(outgoing, None)
        return self._send(outgoing, _sizes(step.sent), _sizes(step.received))

    def start_back(self, dkeys: Tensor, step: Step) -> _Underway:
        """Begin to send the gradients of what arrived to whose keys they are."""
        if step.is_local:
            return _Underway(dkeys, None)
        return self._send(dkeys, _sizes(step.received), _sizes(step.sent))

    def add(self, dkeys: Tensor, step: Step, returning: _Underway) -> None:
        """Wait for gradients to return, and add them to the own keys'."""
        at, returned = 0, returning.wait()
        for parts in step.sent:
            for part in parts:
                dkeys[_tokens(part)] += returned[at : at + part.count]
                at += part.count

    def _send(self, outgoing: Tensor, sent: list[int], received: list[int]) -> _Underway:
        rows = outgoing.new_empty(sum(received), *outgoing.shape[1:])
        work = dist.all_to_all_single(
            rows, outgoing.contiguous(), received, sent, group=self.group, async_op=True
        )
        return _Underway(rows, work)


def _outgoing(pair: _Pair, step: Step) -> Tensor:
    own = [_tokens(part) for parts in step.sent for part in parts]
    joined = [torch.cat([x[tokens] for x in pair], -1) for tokens in own or (slice(0),)]
    return torch.cat(joined) if len(joined) > 1 else joined[0]


def _tokens(part: Part) -> slice:
    return slice(part.start, part.start + part.count)


def _sizes(by_rank: Sequence[Sequence[Part]]) -> list[int]:
    return [sum(part.count for part in parts) for parts in by_rank]


def in_order(rows: Tensor, step: Step) -> Tensor:
    """Put received parts in the order of their tokens."""
    if list(step.order) == sorted(step.order):
        return rows
    parts = rows.split([part.count for part in step.parts])
    return torch.cat([parts[i] for i in step.order])


def as_received(rows: Tensor, step: Step) -> Tensor:
    """The inverse of in_order."""
    if list(step.order) == sorted(step.order):
        return rows
    counts = [part.count for part in step.parts]
    parts = dict(zip(step.order, rows.split([counts[i] for i in step.order]), strict=True))
    return torch.cat([parts[i] for i in range(len(parts))])


class _Tied(torch.autograd.Function):
    """o as it is, with `other` in its graph at a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, other: Tensor) -> Tensor:
        ctx.like = (other.shape, other.dtype)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.like
        return grads[0], grads[0].new_zeros(shape, dtype=dtype)


class _BlockAttention(torch.autograd.Function):
    """Causal attention of own pieces, joined with their documents' earlier keys."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: ContextBatch,
        exchange: Exchange,
        scale: float,
        again: KeptResult | None,
    ) -> Tensor:
        ctx.own, ctx.exchange, ctx.scale = own, exchange, scale
        if again is not None and again.known is not None:
            # The keys of others are fetched in the backward, as by ring.
            o, lse = again.known
            o = o.view_as(o)
            ctx.save_for_backward(q, k, v, o, lse)
            return o
        underway = exchange.start((k, v), exchange.steps[0])
        first, lse = attention_block(q, k, v, Block(own.lengths, own.lengths, scale, causal=True))
        o = first.to(lse.dtype)
        kept = []
        for step, rows in _arrivals(exchange, (k, v), underway):
            kept += [] if exchange.in_turn else [rows]
            for read in _reads(own, step):
                block_k, block_v = rows[read.keys].chunk(2, -1)
                found = attention_block(q[read.tokens], block_k, block_v, read.block(scale))
                join_blocks(o[read.tokens], lse[:, read.tokens], *found)
        o = o.to(v.dtype)
        if again is not None:
            again.keep(o, lse)
            # The first run's backward never comes.
            kept = []
        ctx.save_for_backward(q, k, v, o, lse, *kept)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, *kept = ctx.saved_tensors
        own, exchange, scale, (do,) = ctx.own, ctx.exchange, ctx.scale, grads
        if kept:
            arrivals = zip(exchange.steps, kept, strict=True)
        else:
            arrivals = _arrivals(exchange, (k, v), exchange.start((k, v), exchange.steps[0]))
        whole = Block(own.lengths, own.lengths, scale, causal=True)
        dq, dkeys = _gradients(do, (q, k, v), o, lse, whole)
        returning = None
        for step, rows in arrivals:
            drows = torch.zeros_like(rows, dtype=lse.dtype)
            for read in _reads(own, step):
                at = read.tokens
                queries, keys = (do[at], q[at], o[at], lse[:, at]), rows[read.keys]
                _add_gradients(dq[at], drows[read.keys], queries, keys, read.block(scale))
            # The one before has had this step's products to return in.
            if returning is not None:
                exchange.add(dkeys, *returning)
            returning = step, exchange.start_back(as_received(drows, step), step)
            if step.is_local:
                exchange.add(dkeys, *returning)
                returning = None
            del rows, drows
        if returning is not None:
            exchange.add(dkeys, *returning)
        dk, dv = dkeys.chunk(2, -1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _add_gradients(
    dq: Tensor, dkeys: Tensor, queries: tuple[Tensor, ...], keys: Tensor, block: Block
) -> None:
    """Add in place what a block gives its queries (do, q, o, lse) and its keys."""
    do, q, o, lse = queries
    k, v = keys.chunk(2, -1)
    found = attention_block_backward(do, (q, k, v), o, lse, block)
    for total, more in zip((dq, *dkeys.chunk(2, -1)), found, strict=True):
        total += more


def _gradients(
    do: Tensor, tokens: tuple[Tensor, Tensor, Tensor], o: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Of a block's queries and keys, in lse's dtype, for others to add to; dk and dv as one."""
    dq, dk, dv = attention_block_backward(do, tokens, o, lse, block)
    dkeys = dk.new_empty(*dk.shape[:-1], 2 * dk.shape[-1], dtype=lse.dtype)
    for total, found in zip(dkeys.chunk(2, -1), (dk, dv), strict=True):
        total.copy_(found)
    return dq.to(lse.dtype), dkeys


class _Read(NamedTuple):
    """A first piece and the range of a step's keys that it sees, all of them."""

    tokens: slice
    keys: slice

    def block(self, scale: float) -> Block:
        queries, keys = (s.stop - s.start for s in self)
        return Block([queries], [keys], scale, causal=False)


def _reads(own: ContextBatch, step: Step) -> list[_Read]:
    reads = zip(own.first_pieces, step.reads, strict=True)
    return [_Read(piece.tokens, slice(*read)) for piece, read in reads if read is not None]


def _arrivals(exchange: Exchange, pair: _Pair, underway: _Underway):
    """Each step with its rows in the tokens' order; the next exchange begins before it is used."""
    steps = exchange.steps
    for n, step in enumerate(steps):
        rows = underway.wait()
        if n + 1 < len(steps):
            underway = exchange.start(pair, steps[n + 1])
        yield step, in_order(rows, step)
