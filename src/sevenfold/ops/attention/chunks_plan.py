"""In which blocks a chunk of a prompt meets its sequence's keys; numbers on the host alone.

Queries and keys are cut into powers of two of tokens, so that few shapes are ever met: a library
that builds a plan for each shape builds some dozens in all, whatever the prompts' lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """unit_tokens, most_tokens: of a block, at least and at most; powers of two."""

    unit_tokens: int
    most_tokens: int


class Span(NamedTuple):
    """Tokens `first` up to, not including, `end`."""

    first: int
    end: int

    @property
    def num_tokens(self) -> int:
        """How many."""
        return self.end - self.first


class Piece(NamedTuple):
    """One block: rows of the chunk and places of the sequence.

    causal: whether the rows are the keys' own, and see those up to themselves; else all.
    """

    rows: Span
    keys: Span
    causal: bool


class Gather(NamedTuple):
    """Places whose keys lie end to end at one time, and the blocks that read them."""

    keys: Span
    pieces: Sequence[Piece]


def plan_chunk(past: int, new: int, cut: Cut) -> list[Gather]:
    """Return blocks in which `new` tokens see the `past` ones, and each other causally.

    Every row meets every key that it sees once. Rows that no unit divides are the end of a block
    that begins among the rows before them, and computes those twice, to the same effect. Keys that
    no unit divides are a block of fewer keys. A chunk of less than a unit is one block of rows.

    Args:
        past: tokens before the new ones.
        new: tokens, at least one.
        cut: how long a block is.
    """
    rows, gathers = _row_spans(new, cut), []
    for first in range(0, past, cut.most_tokens):
        keys = Span(first, min(first + cut.most_tokens, past))
        pieces = [Piece(span, part, False) for span in rows for part in _key_spans(keys, cut)]
        gathers.append(Gather(keys, pieces))
    pieces = []
    for span in rows:
        before = _key_spans(Span(past, past + span.first), cut)
        pieces += [Piece(span, part, False) for part in before]
        pieces.append(Piece(span, Span(past + span.first, past + span.end), True))
    return [*gathers, Gather(Span(past, past + new), pieces)]


def is_round(tokens: int, cut: Cut) -> bool:
    """Whether a block may have so many tokens where shapes must be few."""
    return cut.unit_tokens <= tokens <= cut.most_tokens and tokens & (tokens - 1) == 0


def _row_spans(new: int, cut: Cut) -> list[Span]:
    spans, end = _round_spans(Span(0, new), cut)
    return spans if end == new else [*spans, Span(max(0, new - cut.unit_tokens), new)]


def _key_spans(keys: Span, cut: Cut) -> list[Span]:
    spans, end = _round_spans(keys, cut)
    return spans if end == keys.end else [*spans, Span(end, keys.end)]


def _round_spans(tokens: Span, cut: Cut) -> tuple[list[Span], int]:
    """Powers of two, the largest first, and where they end: less than a unit is left."""
    spans, at, size = [], tokens.first, cut.most_tokens
    while size >= cut.unit_tokens:
        while at + size <= tokens.end:
            spans.append(Span(at, at + size))
            at += size
        size //= 2
    return spans, at
