"""How sequences are cut into segments that run side by side; plain host code."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# A segment shorter than this spends more on its warm-up than it wins.
MIN_SEGMENT_TOKENS = 2048
# A sequence is cut into one segment more from this part of a segment on.
_ROUND_UP = 0.45


@dataclass(frozen=True)
class Stop:
    """A state to keep: the state after a number of tokens of a sequence goes to a slot."""

    sequence: int
    num_tokens: int
    slot: int


@dataclass(frozen=True)
class Segments:
    """Segments of all sequences, on the device.

    table: [I, 7] int32, a row for each segment: sequence, its first token and the one after its
        last among all tokens, segments of its sequence before it, segments of its sequence, first
        stop of its sequence, and the one after its last.
    stops: [M, 2] int32, tokens of the sequence before a stop, and slot; ordered.
    most: segments of the sequence that has most of them.
    """

    table: Tensor
    stops: Tensor
    most: int


@lru_cache(maxsize=64)
def plan_segments(
    lengths: tuple[int, ...],
    num_segments: int,
    min_tokens: int,
    stops: tuple[Stop, ...],
    device: torch.device,
) -> Segments:
    """Cut sequences into about num_segments segments, and at least one each.

    Args:
        lengths: tokens of each sequence, 0 or more.
        num_segments: what keeps the device busy; more when there are more sequences.
        min_tokens: a longer sequence may be cut into segments of about this length.
        stops: states to keep, in any order.
        device: where the tables lie.

    Returns:
        Segments, those of the longest sequences first, so that the short ones fill the gaps.
    """
    target = max(sum(lengths) / max(num_segments, 1), min_tokens)
    counts = [max(1, int(n / target + 1 - _ROUND_UP)) for n in lengths]
    first = [0, *accumulate(lengths)]
    ordered = sorted(stops, key=lambda stop: (stop.sequence, stop.num_tokens))
    kept = [0, *accumulate(_count(ordered, n) for n in range(len(lengths)))]
    longest_first = sorted(range(len(lengths)), key=lambda n: -lengths[n] / counts[n])
    rows = [
        [n, first[n], first[n + 1], i, counts[n], kept[n], kept[n + 1]]
        for n in longest_first
        for i in range(counts[n])
    ]
    return Segments(
        table=torch.tensor(rows, dtype=torch.int32).view(-1, 7).to(device),
        stops=torch.tensor([[s.num_tokens, s.slot] for s in ordered], dtype=torch.int32)
        .view(-1, 2)
        .to(device),
        most=max(counts, default=1),
    )


def _count(stops: Sequence[Stop], sequence: int) -> int:
    return sum(stop.sequence == sequence for stop in stops)
