"""Cuts of a row that is filled in part: one launch, and of every length the tokens that count."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.ops import PaddedCuts
from sevenfold.ops.lightning import segments
from sevenfold.ops.lightning.segments import Plan, Room, Segment, Stop, plan_segments

CPU = torch.device("cpu")
C, LEAST = 4, 8
few = settings(derandomize=True, max_examples=80, deadline=None)
some_heads = st.integers(1, 3)
rooms = st.builds(Room, some_heads, some_heads, st.integers(1, 12), st.just(C), st.integers(0, 9))
filled = st.integers(1, 90).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


@pytest.fixture(autouse=True, scope="module")
def _small_segments():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MIN_SEGMENT_TOKENS", LEAST)
        patch.setattr(segments, "MIN_PIECE_TOKENS", C)
        plan_segments.cache_clear()
        yield
    plan_segments.cache_clear()


def rows(table: torch.Tensor) -> list[Segment]:
    return [Segment(*row) for row in table.tolist()]


def written(cuts: PaddedCuts, num_tokens: int, stops: tuple[Stop, ...] = ()) -> Plan:
    """The plan of a length, in numbers that held something else before."""
    numbers = np.full(cuts.num_numbers, 77, np.int64)
    cuts.write(numbers, cuts.num_tokens, ())
    cuts.write(numbers, num_tokens, stops)
    return cuts.plan(torch.from_numpy(numbers).int())


@few
@given(sizes=filled, room=rooms)
def test_what_counts_lies_in_one_segment_and_the_last_one_ends_it(
    sizes: tuple[int, int], room: Room
) -> None:
    T, L = sizes
    whole, plan = plan_segments((T,), room, (), False, CPU), written(PaddedCuts(T, 0, room, CPU), L)
    found = rows(plan.segments)
    assert sorted(t for s in found for t in range(s.start, s.end)) == list(range(L))
    for full, own in zip(rows(whole.segments), found, strict=True):
        assert (own.start, own.end) == (min(full.start, L), min(full.end, L))
        assert (own.sequence, own.slot) == (full.sequence, full.slot)
    assert [s.end for s in found if s.is_last] == [L]
    assert all(s.start < s.end for s in found if s.is_last)
    assert (len(plan.pieces), plan.num_slots) == (len(whole.pieces), whole.num_slots)
    assert plan.chains is whole.chains
    assert plan.deal is whole.deal


@few
@given(sizes=filled, room=rooms)
def test_pieces_in_front_of_a_segment_that_counts_are_whole_and_others_empty(
    sizes: tuple[int, int], room: Room
) -> None:
    T, L = sizes
    whole, plan = plan_segments((T,), room, (), False, CPU), written(PaddedCuts(T, 0, room, CPU), L)
    needed = {s.slot for s in rows(plan.segments) if s.start < s.end}
    for full, own in zip(rows(whole.pieces), rows(plan.pieces), strict=True):
        assert own in (full, full._replace(end=full.start))
        assert (own == full) == any(slot >= full.slot for slot in needed)


@few
@given(sizes=filled, room=rooms, data=st.data())
def test_a_stop_falls_in_one_segment(sizes: tuple[int, int], room: Room, data) -> None:
    T, L = sizes
    marks = data.draw(st.lists(st.integers(1, L), max_size=6, unique=True))
    stops = tuple(Stop(0, tokens, 9 - slot) for slot, tokens in enumerate(marks))
    plan = written(PaddedCuts(T, 6, room, CPU), L, stops)
    table = plan.stops.tolist()
    assert len(table) == 7
    found = []
    for s in rows(plan.segments):
        own = table[s.first_stop : s.end_stop]
        assert own == sorted(own)
        found += [Stop(0, s.start + tokens, slot) for tokens, slot in own]
    assert sorted(found) == sorted(stops)


@pytest.mark.parametrize(
    ("num_tokens", "stops", "message"),
    [
        (0, (), "num_tokens must lie in 1 to 9, got 0"),
        (10, (), "num_tokens must lie in 1 to 9, got 10"),
        (9, (Stop(0, 1, 0), Stop(0, 2, 1)), "stops must be at most 1, got 2"),
        (5, (Stop(0, 6, 0),), "num_tokens must lie in 1 to 5, the length of sequence 0, got 6"),
        (5, (Stop(1, 1, 0),), "sequence must lie in 0 to 0, got 1"),
    ],
)
def test_wrong_numbers(num_tokens: int, stops: tuple[Stop, ...], message: str) -> None:
    cuts = PaddedCuts(9, 1, Room(1, 1, 1, C, 0), CPU)
    with pytest.raises(ValueError, match=re.escape(message)):
        cuts.write(np.zeros(cuts.num_numbers, np.int64), num_tokens, stops)
