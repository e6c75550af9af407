"""Best-fit packing of spans into rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from sevenfold.data.pieces import Span


def pack_spans(spans: Sequence[Span], row_tokens: int) -> list[list[Span]]:
    """Pack spans into as few rows as their total allows, cutting a span only to fill a row.

    Longest first, each span goes to the fullest row that still has room for all of it. Spans
    that fit nowhere are then cut along the free ends, largest first. All rows are full but the
    last, which holds what the total leaves for it.

    Args:
        spans: each of at most row_tokens pairs.
        row_tokens: capacity of a row.

    Returns:
        ceil(total / row_tokens) rows; every pair of every span is in exactly one of them.

    Source: best-fit decreasing; without truncation as in Ding et al., "Fewer Truncations Improve
        Language Modeling", 2024, but with the rest cut instead of padded.
    """
    total = sum(span.length for span in spans)
    whole, rest = divmod(total, row_tokens)
    rows = _Rows([row_tokens] * whole + ([rest] if rest else []))
    longest_first = sorted(spans, key=lambda span: (-span.length, span.document, span.start))
    left_over = [span for span in longest_first if not rows.place(span)]
    for span in left_over:
        rows.place_in_parts(span)
    return rows.contents


class _Rows:
    """Rows with free room, kept sorted by room."""

    def __init__(self, capacities: Sequence[int]) -> None:
        self.contents: list[list[Span]] = [[] for _ in capacities]
        self._room = sorted((room, number) for number, room in enumerate(capacities))

    def place(self, span: Span) -> bool:
        """Put the span into the fullest row that can hold it; return whether there was one."""
        at = bisect_left(self._room, (span.length, 0))
        if at == len(self._room):
            return False
        self._fill(at, span)
        return True

    def place_in_parts(self, span: Span) -> None:
        """Cut the span along the largest free ends until the rest fits one row."""
        while not self.place(span):
            room, _ = self._room[-1]
            self._fill(len(self._room) - 1, Span(span.document, span.start, room))
            span = Span(span.document, span.start + room, span.length - room)

    def _fill(self, at: int, span: Span) -> None:
        room, number = self._room.pop(at)
        self.contents[number].append(span)
        if room > span.length:
            insort(self._room, (room - span.length, number))


def clip_spans(spans: Iterable[Span], skip: int, take: int) -> list[Span]:
    """Return the pairs [skip, skip + take) of the spans laid end to end."""
    clipped: list[Span] = []
    begin = -skip
    for span in spans:
        first, last = max(0, begin), min(take, begin + span.length)
        if first < last:
            clipped.append(Span(span.document, span.start + first - begin, last - first))
        begin += span.length
    return clipped
