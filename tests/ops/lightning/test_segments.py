"""Cuts of sequences: every token once, states between where they belong, stops where they fall."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sevenfold.ops.lightning import segments
from sevenfold.ops.lightning.segments import Plan, Room, Segment, Stop, plan_segments

CPU = torch.device("cpu")
C, LEAST = 4, 8
few = settings(derandomize=True, max_examples=80, deadline=None)
some_lengths = st.lists(st.integers(0, 90), min_size=1, max_size=5).map(tuple)
some_heads = st.integers(1, 3)
rooms = st.builds(Room, some_heads, some_heads, st.integers(1, 12), st.just(C), st.integers(0, 9))


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


def of_sequence(plan: Plan, n: int, reverse: bool) -> list[Segment]:
    """Segments in the order of the scan."""
    own = [s for s in rows(plan.segments) if s.sequence == n]
    return sorted(own, key=lambda s: -s.end if reverse else s.start)


@few
@given(lengths=some_lengths, room=rooms, reverse=st.booleans())
def test_every_token_lies_in_one_segment(
    lengths: tuple[int, ...], room: Room, reverse: bool
) -> None:
    plan = plan_segments(lengths, room, (), reverse, CPU)
    spans = [range(s.start, s.end) for s in rows(plan.segments)]
    assert sorted(t for span in spans for t in span) == list(range(sum(lengths)))
    assert [len(s) for s in spans] == sorted((len(s) for s in spans), reverse=True)
    assert (plan.deal is None) == (len({len(s) for s in spans}) == 1)


@few
@given(lengths=some_lengths, room=rooms, reverse=st.booleans())
def test_a_state_between_belongs_to_the_pieces_before_it(
    lengths: tuple[int, ...], room: Room, reverse: bool
) -> None:
    plan = plan_segments(lengths, room, (), reverse, CPU)
    pieces = rows(plan.pieces)
    assert [piece.slot for piece in pieces] == list(range(plan.num_slots))
    for n in range(len(lengths)):
        own = of_sequence(plan, n, reverse)
        assert [s.is_last for s in own] == [0] * (len(own) - 1) + [1]
        assert own[0].slot == -1
        for before, segment in pairwise(own):
            last = pieces[segment.slot]
            assert last.ahead == 0
            border = (last.start, before.start) if reverse else (last.end, before.end)
            assert border[0] == border[1] == (segment.end if reverse else segment.start)
            assert (before.end - before.start) % C == 0


@few
@given(lengths=some_lengths, room=rooms, reverse=st.booleans())
def test_a_chain_runs_over_equal_pieces_without_a_gap(
    lengths: tuple[int, ...], room: Room, reverse: bool
) -> None:
    plan = plan_segments(lengths, room, (), reverse, CPU)
    pieces, seen = rows(plan.pieces), 0
    for sequence, first, count, tokens, in_segment in plan.chains.tolist():
        own = pieces[first : first + count]
        seen += count
        assert {(p.sequence, p.end - p.start) for p in own} == {(sequence, tokens)}
        entry = of_sequence(plan, sequence, reverse)[0]
        at = entry.end if reverse else entry.start
        for piece in own:
            assert at == (piece.end if reverse else piece.start)
            at = piece.start if reverse else piece.end
        ends = {s.slot for s in of_sequence(plan, sequence, reverse)}
        for piece in own:
            to_end = min(slot for slot in ends if slot >= piece.slot) - piece.slot
            assert piece.ahead == to_end * tokens
            last_of_segment = (piece.slot - first) % in_segment == in_segment - 1
            assert last_of_segment == (to_end == 0)
    assert seen == plan.num_slots


@few
@given(lengths=some_lengths, room=rooms, data=st.data())
def test_a_stop_falls_in_one_segment(lengths: tuple[int, ...], room: Room, data) -> None:
    marks = [(n, t) for n, length in enumerate(lengths) for t in range(1, length + 1)]
    chosen = data.draw(st.lists(st.sampled_from(marks), max_size=6)) if marks else []
    stops = tuple(Stop(n, t, slot) for slot, (n, t) in enumerate(chosen))
    plan = plan_segments(lengths, room, stops, False, CPU)
    table, first = plan.stops.tolist(), [sum(lengths[:n]) for n in range(len(lengths))]
    found = [
        (s.sequence, s.start - first[s.sequence] + tokens, slot)
        for s in rows(plan.segments)
        for tokens, slot in table[s.first_stop : s.end_stop]
    ]
    assert sorted(found) == sorted(stops)
    assert len(table) == len(stops) + 1


def test_states_between_keep_to_their_room() -> None:
    plan = plan_segments((800,), Room(1, 1, 10, C, 25), (), False, CPU)
    assert len(plan.segments) == 10
    assert plan.num_slots == 18  # two for each of nine segments; three would be 27


def test_whole_sequences_are_not_cut_where_they_fill_the_programs() -> None:
    plan = plan_segments((64,) * 40, Room(1, 1, 10, C, 100), (), False, CPU)
    assert (len(plan.segments), plan.num_slots, plan.deal) == (40, 0, None)


@few
@given(lengths=some_lengths, room=rooms, singly=st.integers(0, 4))
def test_every_segment_of_every_head_is_dealt_once(
    lengths: tuple[int, ...], room: Room, singly: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_DEALT_SINGLY", singly)
        plan_segments.cache_clear()
        plan = plan_segments(lengths, room, (), False, CPU)
        sizes = [s.end - s.start for s in rows(plan.segments)]
        loads = segments.deal_out(sizes, room._replace(num_heads=room.num_dealt))[1]
    assume(plan.deal is not None)
    table, P = plan.deal.tolist(), room.num_programs
    works = table[P + 1 : -1]
    assert sorted(works) == list(range(len(sizes) * room.num_dealt))
    for program in range(P):
        own = works[table[program] : table[program + 1]]
        assert sum(sizes[work // room.num_dealt] for work in own) == loads[program]


@few
@given(lengths=some_lengths, room=rooms)
def test_no_program_has_much_more_than_the_others(lengths: tuple[int, ...], room: Room) -> None:
    sizes = sorted(lengths, reverse=True)
    _, loads = segments.deal_out(sizes, room)
    # Whoever gets a segment had least; so it ends at most that segment above the mean.
    assert loads.max() <= sum(lengths) * room.num_heads / room.num_programs + sizes[0]
