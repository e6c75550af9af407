"""How sequences are cut into segments that run side by side; plain host code, no decays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A shorter segment costs more than it wins.
MIN_SEGMENT_TOKENS = 2048
# Share of the device's time that must go to work, for sequences to be cut no further.
_ENOUGH = 0.93
_MOST_ROUNDS = 8


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
    is_last: 1 where the scan leaves the sequence.
    first_stop, end_stop: rows of the table of stops.
    """

    start: int
    end: int
    sequence: int
    slot: int
    is_last: int
    first_stop: int
    end_stop: int


@dataclass(frozen=True)
class Plan:
    """Segments of all sequences, on the device.

    segments: [I, 7] int32, rows as Segment; the longest first.
    before: [J, 7] int32, those that others follow; slot is that of the segment that follows.
    chains: [L, 4] int32, sequences of several segments: sequence, first slot, slots, tokens of
        every segment but the last.
    stops: [M + 1, 2] int32, tokens after the segment's start, and slot of the pool; the last row
        is a sentinel.
    num_slots: states between segments.
    is_even: all segments are equally long.
    """

    segments: Tensor
    before: Tensor
    chains: Tensor
    stops: Tensor
    num_slots: int
    is_even: bool


@lru_cache(maxsize=64)
def plan_segments(
    lengths: tuple[int, ...],
    num_heads: int,
    num_programs: int,
    chunk_tokens: int,
    stops: tuple[Stop, ...],
    reverse: bool,
    device: torch.device,
) -> Plan:
    """Cut sequences into segments of about equal length.

    Args:
        lengths: tokens of each sequence, 0 or more.
        num_heads: H, or heads times tiles; every head has the same segments.
        num_programs: how many of num_heads times segments run at once.
        chunk_tokens: a segment is a multiple of it, but for the last one of a sequence.
        stops: states to keep, in any order; forward only.
        reverse: the scan enters a sequence at its end.
        device: where the tables lie.
    """
    sizes = _segment_sizes(lengths, num_heads, num_programs, chunk_tokens)
    first = [0, *accumulate(lengths)]
    segments, before, chains, kept = [], [], [], []
    slots = 0
    for n, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        count = max(1, -(-length // size))
        if count > 1:
            chains.append([n, slots, count - 1, size])
        for i in range(count):
            own = [s for s in stops if s.sequence == n and i * size < s.num_tokens <= i * size + size]
            rows = [(s.num_tokens - i * size, s.slot) for s in sorted(own, key=lambda s: s.num_tokens)]
            a, b = i * size, min(length, i * size + size)
            start, end = (first[n + 1] - b, first[n + 1] - a) if reverse else (first[n] + a, first[n] + b)
            slot = slots + i - 1 if i else -1
            ends = (len(kept), len(kept) + len(rows))
            segments.append(Segment(start, end, n, slot, int(i == count - 1), *ends))
            if i < count - 1:
                before.append(Segment(start, end, n, slots + i, 0, 0, 0))
            kept += rows
        slots += count - 1
    segments.sort(key=lambda s: s.start - s.end)
    return Plan(
        _table(segments, 7, device),
        _table(before, 7, device),
        _table(chains, 4, device),
        _table([*kept, (0, 0)], 2, device),
        slots,
        len({s.end - s.start for s in segments}) <= 1,
    )


def _segment_sizes(
    lengths: Sequence[int], num_heads: int, num_programs: int, chunk_tokens: int
) -> list[int]:
    """Tokens of the segments of each sequence: the fewest cuts that leave few programs idle."""
    total = sum(lengths) * num_heads
    options = []
    for rounds in range(1, _MOST_ROUNDS + 1):
        target = max(MIN_SEGMENT_TOKENS, total / (num_programs * rounds))
        counts = [max(1, round(n / target)) for n in lengths]
        longest = _longest_program(lengths, counts, num_heads, num_programs)
        options.append((longest, counts))
        if longest * num_programs * _ENOUGH <= total:
            break
    counts = min(options, key=lambda option: option[0])[1]
    return [
        max(1, math.ceil(n / c / chunk_tokens)) * chunk_tokens
        for n, c in zip(lengths, counts, strict=True)
    ]


def _longest_program(
    lengths: Sequence[int], counts: Sequence[int], num_heads: int, num_programs: int
) -> int:
    """Tokens of the program that has most of them, as the kernels deal segments out."""
    pieces = np.repeat(np.divide(lengths, counts), np.multiply(counts, num_heads))
    rounds = math.ceil(len(pieces) / num_programs)
    dealt = np.zeros(rounds * num_programs)
    dealt[: len(pieces)] = -np.sort(-pieces)
    dealt = dealt.reshape(rounds, num_programs)
    dealt[1::2] = dealt[1::2, ::-1]
    return int(dealt.sum(0).max(initial=0))


def _table(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int32).view(-1, width).to(device)
