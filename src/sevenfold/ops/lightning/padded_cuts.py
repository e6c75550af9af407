"""Cuts of a row of which only the first tokens count: numbers say how many, and may change."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sevenfold.ops.lightning.segments import Plan, Room, Segment, Stop, cut_rows, plan_segments
from sevenfold.ops.lightning.snapshots import check_stops

_WIDTH = len(Segment._fields)
_IS_LAST, _FIRST_STOP, _AHEAD = map(Segment._fields.index, ("is_last", "first_stop", "ahead"))


class PaddedCuts:
    """Where a row of T tokens is cut, whichever of them count.

    Segments and pieces begin where those of T tokens do, so that a kernel's launch depends on T
    alone and a CUDA graph can hold it. What a run reads beside that are numbers in memory of the
    caller's: the segment in which the tokens end is shorter and the last, those behind it are
    empty, and so are pieces that no segment follows.
    """

    def __init__(self, num_tokens: int, most_stops: int, room: Room, device: torch.device) -> None:
        """Cut a row of num_tokens.

        Args:
            num_tokens: T, at least 1.
            most_stops: states that are kept in a run, at most.
            room: what the cuts must suit.
            device: where runs read.
        """
        self.num_tokens, self.most_stops = num_tokens, most_stops
        whole = ((num_tokens,), room, (), False)
        self._plan, rows = plan_segments(*whole, device), cut_rows(*whole)
        self._segments, self._pieces = (
            np.array(x, np.int64).reshape(-1, _WIDTH) for x in (rows.segments, rows.pieces)
        )
        self._sizes = [self._segments.size, self._pieces.size, 2 * (most_stops + 1)]
        # Where each segment stands among the numbers, and its tokens.
        self._borders = [(_WIDTH * n, s.start, s.end) for n, s in enumerate(rows.segments)]

    @property
    def num_numbers(self) -> int:
        """Numbers that say which tokens count and which states are kept."""
        return sum(self._sizes)

    def write(self, numbers: np.ndarray, num_tokens: int, stops: Sequence[Stop]) -> None:
        """Let the first tokens of the row count.

        Args:
            numbers: [num_numbers] integers, written.
            num_tokens: 1 to T.
            stops: states to keep, of sequence 0.

        Raises:
            ValueError: num_tokens or a stop lies outside the row, or stops are too many.
        """
        self._check(num_tokens, stops)
        # By slices: np.split takes as long as all the rest.
        first, end = self._sizes[0], self._sizes[0] + self._sizes[1]
        if end > first:
            self._write_pieces(numbers[first:end].reshape(-1, _WIDTH), num_tokens)
        numbers[:first], numbers[end:] = self._segments.ravel(), 0
        at = 0
        for place, start, stop in self._borders:
            own = [(s.num_tokens - start, s.slot) for s in stops if start < s.num_tokens <= stop]
            if own:
                kept = end + 2 * at
                numbers[kept : kept + 2 * len(own)] = np.ravel(sorted(own))
            # Number by number: a segment is few, and a short row has one.
            numbers[place], numbers[place + 1] = min(start, num_tokens), min(stop, num_tokens)
            numbers[place + _IS_LAST] = start < num_tokens <= stop
            numbers[place + _FIRST_STOP], numbers[place + _FIRST_STOP + 1] = at, at + len(own)
            at += len(own)

    def plan(self, numbers: Tensor) -> Plan:
        """Return what a run reads: views of numbers [num_numbers] int32 on the device."""
        segments, pieces, stops = numbers.split(self._sizes)
        return replace(
            self._plan,
            segments=segments.view(-1, _WIDTH),
            pieces=pieces.view(-1, _WIDTH),
            stops=stops.view(-1, 2),
        )

    def _write_pieces(self, pieces: np.ndarray, num_tokens: int) -> None:
        """Whole pieces, or none: kernels take a piece's chunks for whole."""
        pieces[:] = self._pieces
        starts, ends, ahead = (self._pieces[:, i] for i in (0, 1, _AHEAD))
        pieces[:, 1] = np.where(ends + ahead < num_tokens, ends, starts)

    def _check(self, num_tokens: int, stops: Sequence[Stop]) -> None:
        if not 1 <= num_tokens <= self.num_tokens:
            raise ValueError(f"num_tokens must lie in 1 to {self.num_tokens}, got {num_tokens}")
        if len(stops) > self.most_stops:
            raise ValueError(f"stops must be at most {self.most_stops}, got {len(stops)}")
        check_stops(stops, (num_tokens,))
