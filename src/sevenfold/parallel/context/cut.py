"""How a packed row is cut among context ranks: 2 R equal stretches, rank r with r and 2 R - 1 - r.

One order for the whole model. A causal softmax layer gives stretch c work that grows with c, so a
first and a last stretch together are as dear on every rank. Lightning layers cost the same wherever
a token lies; two stretches a rank add one more state to those that travel, whatever the row's
length. Reordering around the softmax layers alone would move queries and outputs instead, whose
bytes grow with the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

NUM_STRETCHES = 2  # of a rank


@dataclass(frozen=True)
class Cut:
    """A row of documents, cut; the same on all ranks.

    num_ranks: R.
    size: tokens of a stretch.
    begun: [2 R] first token of the document that each stretch begins in, or the stretch's own.
    """

    num_ranks: int
    size: int
    begun: tuple[int, ...]

    @property
    def num_stretches(self) -> int:
        """2 R."""
        return len(self.begun)

    @property
    def crosses(self) -> bool:
        """Whether any document reaches over a border between stretches."""
        return any(self.enters(c) for c in range(self.num_stretches))

    def start(self, stretch: int) -> int:
        """The first token of a stretch."""
        return stretch * self.size

    def end(self, stretch: int) -> int:
        """The token after its last."""
        return (stretch + 1) * self.size

    def enters(self, stretch: int) -> bool:
        """Whether a stretch begins inside a document."""
        return self.begun[stretch] < self.start(stretch)

    def of_rank(self, rank: int) -> tuple[int, int]:
        """A rank's stretches, in their order in its tokens."""
        return rank, self.num_stretches - 1 - rank

    def distance(self, source: int, target: int) -> int | None:
        """Tokens between two stretches, if one document reaches from the end of the first into
        the second; else None."""
        if source >= target or self.begun[target] >= self.end(source):
            return None
        return self.start(target) - self.end(source)

    def span(self, source: int, target: int, window: int | None) -> tuple[int, int] | None:
        """Tokens of a stretch whose keys a later one sees, counted from its start; None if none."""
        if source >= target:
            return None
        first = self.begun[target]
        if window is not None:
            first = max(first, self.start(target) - window + 1)
        first = max(first - self.start(source), 0)
        return (first, self.size) if first < self.size else None


def cut_row(lengths: Sequence[int], num_ranks: int) -> Cut:
    """Cut a row of documents.

    Args:
        lengths: tokens of each document of the whole row, at least 1.
        num_ranks: context ranks.

    Raises:
        ValueError: twice the ranks do not divide the row's tokens.
    """
    total, count = sum(lengths), NUM_STRETCHES * num_ranks
    if total % count:
        raise ValueError(f"2 * num_ranks must divide the row's {total} tokens, got {count}")
    size = total // count
    starts, begun, at = [0, *accumulate(lengths)], [], 0
    for border in range(0, total, size):
        while starts[at + 1] <= border:
            at += 1
        begun.append(starts[at])
    return Cut(num_ranks, size, tuple(begun))


def pieces_between(lengths: Sequence[int], first: int, end: int) -> list[tuple[int, int]]:
    """Past and length of each piece of a document between two tokens of the row."""
    found = []
    for a, b in pairwise([0, *accumulate(lengths)]):
        if max(a, first) < min(b, end):
            found.append((max(0, first - a), min(b, end) - max(a, first)))
    return found
