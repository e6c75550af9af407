"""How sequences are cut into segments that run side by side; plain host code, no decays."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A shorter segment costs more than it wins.
MIN_SEGMENT_TOKENS = 2048
# A piece of a segment is at least so long: what it adds takes a kernel's start and a state's bytes.
MIN_PIECE_TOKENS = 1024
# Share of the device's time that must go to work, for sequences to be cut no further.
_ENOUGH = 0.93
_MOST_ROUNDS = 8
# Segments, the longest, of which each finds the programs that have least to do.
_DEALT_SINGLY = 64
# Pieces of a sequence whose states are summed one after another, where it has fewer segments.
_MOST_IN_A_CHAIN = 64


class Stop(NamedTuple):
    """A state to keep: the state after a number of tokens of a sequence goes to a slot."""

    sequence: int
    num_tokens: int
    slot: int


class Segment(NamedTuple):
    """Tokens that one program scans for one head; a row of the kernels' table, int32.

    start, end: its first token and the one after its last, among all tokens.
    sequence: whose initial state the first segment of a sequence meets.
    slot: where the state that it meets stands among the states between segments; -1 in the first.
        Of a piece: where what it adds goes.
    is_last: 1 where the scan leaves the sequence.
    first_stop, end_stop: rows of the table of stops.
    ahead: of a piece, the tokens from its end to that of its segment.
    """

    start: int
    end: int
    sequence: int
    slot: int
    is_last: int
    first_stop: int
    end_stop: int
    ahead: int


@dataclass(frozen=True)
class Plan:
    """Segments of all sequences, on the device.

    segments: [I, 8] int32, rows as Segment; the longest first.
    pieces: [J, 8] int32, equal parts of the segments that others follow.
    chains: [L, 5] int32, sequences of several segments: sequence, first slot, slots, tokens of
        each piece, pieces of each segment.
    stops: [M + 1, 2] int32, tokens after the segment's start, and slot of the pool; the last row
        is a sentinel.
    num_slots: pieces.
    deal: None where all segments are equally long. Else int32, which program takes which: P + 1
        borders, and between them in what follows the numbers i * H + h of a program's segments i
        and heads h, or heads and tiles.
    """

    segments: Tensor
    pieces: Tensor
    chains: Tensor
    stops: Tensor
    num_slots: int
    deal: Tensor | None


class Room(NamedTuple):
    """What cuts must suit.

    num_heads: H, or heads times tiles; every head has the same segments.
    num_dealt: pieces of work of a segment: H times the tiles of this scan, which may have fewer
        than another that shares its cuts.
    num_programs: how many of num_heads times segments run at once.
    chunk_tokens: pieces are multiples of it.
    most_slots: states between segments that may be kept, where there are more than segments.
    """

    num_heads: int
    num_dealt: int
    num_programs: int
    chunk_tokens: int
    most_slots: int


@lru_cache(maxsize=64)
def plan_segments(
    lengths: tuple[int, ...],
    room: Room,
    stops: tuple[Stop, ...],
    reverse: bool,
    device: torch.device,
) -> Plan:
    """Cut sequences into segments of about equal length, and those into pieces.

    Args:
        lengths: tokens of each sequence, 0 or more.
        room: what the cuts must suit.
        stops: states to keep, in any order; forward only.
        reverse: the scan enters a sequence at its end.
        device: where the tables lie.
    """
    rows = cut_rows(lengths, room, stops, reverse)
    return Plan(
        segments=_table(rows.segments, 8, device),
        pieces=_table(rows.pieces, 8, device),
        chains=_table(rows.chains, 5, device),
        stops=_table([*rows.stops, (0, 0)], 2, device),
        num_slots=len(rows.pieces),
        deal=None if rows.deal is None else _upload(rows.deal, device),
    )


class Rows(NamedTuple):
    """The tables of a Plan on the host, stops without the sentinel."""

    segments: list[Segment]
    pieces: list[Segment]
    chains: list[tuple[int, ...]]
    stops: list[tuple[int, int]]
    deal: Tensor | None


def cut_rows(lengths: tuple[int, ...], room: Room, stops: tuple[Stop, ...], reverse: bool) -> Rows:
    """Arguments as plan_segments'."""
    cuts = _cut(lengths, room)
    segments, pieces, chains, kept = [], [], [], []
    start = 0
    for n, (length, cut) in enumerate(zip(lengths, cuts, strict=True)):
        of_sequence = _Sequence(n, start, length, cut, reverse)
        start += length
        first_slot = len(pieces)
        own = sorted(s for s in stops if s.sequence == n)
        segments += of_sequence.segments(first_slot, own, kept)
        pieces += of_sequence.pieces(first_slot)
        if len(pieces) > first_slot:
            count = len(pieces) - first_slot
            chains.append((n, first_slot, count, cut.piece_tokens, cut.pieces))
    segments.sort(key=lambda segment: segment.start - segment.end)
    sizes = [segment.end - segment.start for segment in segments]
    deal = None if len(set(sizes)) <= 1 else _deal_table(sizes, room)
    return Rows(segments, pieces, chains, kept, deal)


class _Cut(NamedTuple):
    segments: int
    pieces: int  # of each segment but the last
    piece_tokens: int


class _Sequence(NamedTuple):
    """One sequence, whose tokens count from where the scan enters it."""

    number: int
    start: int
    length: int
    cut: _Cut
    reverse: bool

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """First token, and the one after the last, among all tokens."""
        if self.reverse:
            begin, end = self.length - end, self.length - begin
        return self.start + begin, self.start + end

    def segments(
        self, first_slot: int, stops: Sequence[Stop], kept: list[tuple[int, int]]
    ) -> Iterator[Segment]:
        """Every segment; appends its stops to those that are kept."""
        count, pieces, piece_tokens = self.cut
        size = pieces * piece_tokens
        for i in range(count):
            begin, end = i * size, min(self.length, i * size + size)
            own = [(s.num_tokens - begin, s.slot) for s in stops if begin < s.num_tokens <= end]
            first_stop = len(kept)
            kept += own
            slot = first_slot + i * pieces - 1 if i else -1
            is_last = int(i == count - 1)
            span = self.span(begin, end)
            yield Segment(*span, self.number, slot, is_last, first_stop, len(kept), 0)

    def pieces(self, first_slot: int) -> Iterator[Segment]:
        """The pieces of every segment but the last."""
        count, pieces, tokens = self.cut
        for i in range((count - 1) * pieces):
            span = self.span(i * tokens, i * tokens + tokens)
            ahead = (pieces - 1 - i % pieces) * tokens
            yield Segment(*span, self.number, first_slot + i, 0, 0, 0, ahead)


def _cut(lengths: Sequence[int], room: Room) -> list[_Cut]:
    """The fewest segments that leave few programs idle, and as many pieces as there is room for."""
    total = sum(lengths) * room.num_heads
    options = []
    for rounds in range(1, _MOST_ROUNDS + 1):
        target = max(MIN_SEGMENT_TOKENS, total / (room.num_programs * rounds))
        counts = [max(1, round(n / target)) for n in lengths]
        longest = _longest_program(lengths, counts, room)
        options.append((longest, counts))
        if longest * room.num_programs * _ENOUGH <= total:
            break
    counts = min(options, key=lambda option: option[0])[1]
    followed = sum(counts) - len(counts)
    most = room.most_slots // max(followed, 1)
    return [_cut_one(n, count, most, room) for n, count in zip(lengths, counts, strict=True)]


def _cut_one(length: int, count: int, most_pieces: int, room: Room) -> _Cut:
    size = math.ceil(length / count)
    pieces = max(1, min(most_pieces, size // MIN_PIECE_TOKENS, _MOST_IN_A_CHAIN // count))
    tokens = max(1, math.ceil(size / pieces / room.chunk_tokens)) * room.chunk_tokens
    return _Cut(max(1, math.ceil(length / (pieces * tokens))), pieces, tokens)


def _longest_program(lengths: Sequence[int], counts: Sequence[int], room: Room) -> int:
    """Tokens of the program that has most of them, as segments are dealt out."""
    sizes = -np.sort(-np.repeat(np.divide(lengths, counts), counts))
    return int(deal_out(sizes, room)[1].max(initial=0))


def deal_out(sizes: Sequence[int] | np.ndarray, room: Room) -> tuple[np.ndarray, np.ndarray]:
    """Give the segments of all heads, the longest first, to the programs that have least to do.

    Short segments, beyond the first _DEALT_SINGLY, are dealt to and fro.

    Args:
        sizes: tokens of each segment, falling.
        room: its heads and programs.

    Returns:
        The program of each segment and head [I * H], and the tokens of each program [P].
    """
    H, P = room.num_heads, room.num_programs
    loads = np.zeros(P)
    programs = np.empty((len(sizes), H), np.int32)
    for i, size in enumerate(sizes[:_DEALT_SINGLY]):
        for head in range(0, H, P):
            least = np.argsort(loads, kind="stable")[: H - head]
            programs[i, head : head + P] = least
            loads[least] += size
    rest = np.repeat(sizes[_DEALT_SINGLY:], H)
    turn, place = np.divmod(np.arange(len(rest)), P)
    order = np.argsort(loads, kind="stable")
    dealt = order[np.where(turn % 2 == 1, P - 1 - place, place)]
    programs[_DEALT_SINGLY:] = dealt.reshape(-1, H)
    return programs.ravel(), loads + np.bincount(dealt, rest, P)


def _deal_table(sizes: Sequence[int], room: Room) -> Tensor:
    programs, _ = deal_out(sizes, room._replace(num_heads=room.num_dealt))
    borders = np.searchsorted(np.sort(programs), np.arange(room.num_programs + 1))
    # A program without work reads a number behind its border all the same.
    numbers = [*borders, *np.argsort(programs, kind="stable"), 0]
    return torch.tensor(np.array(numbers, np.int32))


def _table(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    return _upload(torch.tensor(list(rows), dtype=torch.int32).view(-1, width), device)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return table.to(device)  # in a capture an error: a graph would copy what has been freed
    return table.pin_memory().to(device, non_blocking=True)
