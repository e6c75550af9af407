"""Which keys travel to which rank, and which of them a stretch's first piece reads.

Only a document that reaches over a border has keys to send, and only to the ranks that it reaches;
under a window only its last tokens. Each rank knows every rank's plan from the documents' lengths.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from sevenfold.parallel.context.cut import Cut


class Part(NamedTuple):
    """Tokens of one stretch whose keys go to a rank.

    stretch: as the cut counts; first: of its tokens, from here to the end of the stretch.
    start: their place among the sending rank's tokens; count: how many.
    """

    stretch: int
    first: int
    start: int
    count: int


class Step(NamedTuple):
    """One exchange: [ranks] parts to and from each rank, and what own first pieces read of it.

    order: places of the received parts in the order of their tokens.
    reads: for each slot, the range of the received tokens in that order, or None.
    is_local: whether every rank reads its own keys alone.
    """

    sent: tuple[tuple[Part, ...], ...]
    received: tuple[tuple[Part, ...], ...]
    order: tuple[int, ...]
    reads: tuple[tuple[int, int] | None, ...]
    is_local: bool

    @property
    def parts(self) -> list[Part]:
        """What arrives, in its order."""
        return [part for parts in self.received for part in parts]


@lru_cache(maxsize=256)
def plan_keys(cut: Cut, rank: int, window: int | None, *, in_turn: bool) -> tuple[Step, ...]:
    """Plan the exchanges of one layer's keys.

    Args:
        cut: of the row.
        rank: whose plan.
        window: tokens that a query sees; None is all of its document.
        in_turn: one peer after another, the nearest first, own keys before them; else all at once.

    Returns:
        Steps, the same number on all ranks; those in which no rank receives anything are left out.
    """
    R = cut.num_ranks
    if not in_turn:
        return (_step(cut, rank, window, set(range(R))),)
    steps = []
    for shift in range(R):
        if any(_parts(cut, (r - shift) % R, r, window) for r in range(R)):
            steps.append(_step(cut, rank, window, {shift}))
    return tuple(steps)


def _step(cut: Cut, rank: int, window: int | None, shifts: set[int]) -> Step:
    """The exchange in which each rank receives from those so many places before it."""
    R = cut.num_ranks
    sent = tuple(_parts(cut, rank, r, window) if (r - rank) % R in shifts else () for r in range(R))
    received = tuple(
        _parts(cut, r, rank, window) if (rank - r) % R in shifts else () for r in range(R)
    )
    flat = [part for parts in received for part in parts]
    order = tuple(sorted(range(len(flat)), key=lambda i: flat[i].stretch))
    reads = tuple(_read(cut, [flat[i] for i in order], c, window) for c in cut.of_rank(rank))
    return Step(sent, received, order, reads, is_local=shifts == {0})


def _parts(cut: Cut, source: int, target: int, window: int | None) -> tuple[Part, ...]:
    """What one rank sends another: of each stretch the longest that a slot of the other needs."""
    found = []
    for slot, stretch in enumerate(cut.of_rank(source)):
        spans = [cut.span(stretch, later, window) for later in cut.of_rank(target)]
        firsts = [span[0] for span in spans if span is not None]
        if firsts:
            first = min(firsts)
            found.append(Part(stretch, first, slot * cut.size + first, cut.size - first))
    return tuple(found)


def _read(
    cut: Cut, parts: Sequence[Part], target: int, window: int | None
) -> tuple[int, int] | None:
    """The range of the parts' tokens, end to end, that a stretch's first piece sees."""
    at, start, end = 0, None, 0
    for part in parts:
        span = cut.span(part.stretch, target, window)
        if span is not None:
            start = at + span[0] - part.first if start is None else start
            end = at + part.count
        at += part.count
    return None if start is None else (start, end)
