"""A chunk of a prompt over its sequence's pages, block by block, joined by log-sum-exp.

Keys and values are gathered from the pages, some at a time, to tokens that lie end to end: the
fastest kernels read whole tiles of them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.chunks_plan import Cut, Gather, Span, plan_chunk
from sevenfold.ops.attention.join import Part


class Chunk(NamedTuple):
    """New tokens of one sequence, whose keys and values lie in pages.

    q: [T, H, D], after `past` tokens.
    k_pages, v_pages: [P, page_tokens, G, D].
    pages: [M] int32 or int64, the sequence's own in the order of its tokens.
    scale: multiplies the scores.
    """

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    pages: Tensor
    past: int
    scale: float


class Means(NamedTuple):
    """What blocks are computed and joined by.

    attend: as attention_block, for a single sequence.
    join: of two parts of the same rows: join(some, more, out), where out may be some.o.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Block], tuple[Tensor, Tensor]]
    join: Callable[[Part, Part, Tensor], Part]


def attend_chunk(chunk: Chunk, cut: Cut, means: Means) -> Tensor:
    """Attend a chunk of one token or more to all before it, and causally to itself.

    Returns:
        [T, H, D] in q's dtype; sums over several blocks are kept in the log-sum-exp's.
    """
    plan = plan_chunk(chunk.past, len(chunk.q), cut)
    number = Counter(piece.rows for gather in plan for piece in gather.pieces)
    parts = (found for gather in plan for found in _parts(chunk, gather, means))
    if number.total() == 1:
        return next(parts)[1].o
    sums = _Sums(torch.empty_like(chunk.q), number, means.join)
    for rows, part in parts:
        sums.add(rows, part)
    return sums.o


def _parts(chunk: Chunk, gather: Gather, means: Means) -> Iterator[tuple[Span, Part]]:
    k, v = (_gathered(x, chunk.pages, gather.keys) for x in (chunk.k_pages, chunk.v_pages))
    for rows, keys, causal in gather.pieces:
        q = chunk.q[rows.first : rows.end]
        here = slice(keys.first - gather.keys.first, keys.end - gather.keys.first)
        block = Block([rows.num_tokens], [keys.num_tokens], chunk.scale, causal)
        yield rows, Part(*means.attend(q, k[here], v[here], block))


def _gathered(pool: Tensor, pages: Tensor, keys: Span) -> Tensor:
    """[S, G, D], the keys or values of some places of a sequence."""
    size = pool.shape[1]
    first = keys.first // size
    tokens = pool.index_select(0, pages[first : -(-keys.end // size)]).flatten(0, 1)
    return tokens[keys.first - first * size :][: keys.num_tokens]


class _Sums:
    """Parts of a chunk's rows, joined as they come; o [T, H, D] holds rows that have all."""

    def __init__(
        self, o: Tensor, number: Counter[Span], join: Callable[[Part, Part, Tensor], Part]
    ) -> None:
        self.o, self._left, self._join = o, number.copy(), join
        self._found: dict[Span, Part] = {}

    def add(self, rows: Span, part: Part) -> None:
        self._left[rows] -= 1
        some, out = self._found.pop(rows, None), self.o[rows.first : rows.end]
        if self._left[rows]:
            self._found[rows] = part if some is None else self._join(some, part, _room(some))
        elif some is None:
            out.copy_(part.o)
        else:
            self._join(some, part, out)


def _room(part: Part) -> Tensor:
    """Where a sum that is not the last may go: it is not rounded."""
    dtype = part.lse.dtype
    return part.o if part.o.dtype == dtype else torch.empty_like(part.o, dtype=dtype)
