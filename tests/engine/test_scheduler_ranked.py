"""A ranked list equals a list sorted anew."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sevenfold.engine.scheduler.ranked import Ranked

RANKS = st.tuples(st.sampled_from([-1.5, 0.0, 2.0]), st.integers(0, 20))


@given(st.lists(st.tuples(RANKS, st.booleans()), max_size=40))
def test_items_stand_in_order(changes: list[tuple[tuple[float, int], bool]]) -> None:
    ranked, present = Ranked[str](), set()
    for rank, wanted in changes:
        if wanted and rank not in present:
            ranked.add(rank, str(rank))
            present.add(rank)
        elif not wanted and rank in present:
            ranked.remove(rank)
            present.remove(rank)
        names = [str(rank) for rank in sorted(present)]
        assert (list(ranked), list(reversed(ranked))) == (names, names[::-1])
        assert len(ranked) == len(names)
        if names:
            ends = (ranked.first, ranked.last, ranked.first_rank)
            assert ends == (names[0], names[-1], min(present))


@pytest.mark.parametrize("rank", [(0.0, 1), (9.0, 9)])
def test_what_is_not_there_cannot_be_removed(rank: tuple[float, int]) -> None:
    ranked = Ranked[str]()
    ranked.add((1.0, 0), "a")
    with pytest.raises(AssertionError, match="rank must be in the list"):
        ranked.remove(rank)
