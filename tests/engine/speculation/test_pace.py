"""When drafting pays: measured costs, what a text shows by itself, and what may be lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.speculation.pace import (
    CREDIT_RATE,
    FEWEST_SAMPLES,
    FIRST_CREDIT,
    FIRST_RUN,
    LONGEST_RUN,
    MOST_AGE,
    MOST_COST,
    MOST_CREDIT,
    MOST_MISSES,
    MOST_TIMES,
    PRIOR_COST,
    Allowance,
    Pace,
    StepTimes,
)
from sevenfold.engine.speculation.shadow import Shadow
from sevenfold.engine.speculation.tree import DraftTree


def test_costs_are_measured_for_each_size_of_batch() -> None:
    times = StepTimes()
    assert times.wants_plain(1)
    assert times.cost(1, 5) == PRIOR_COST
    times.note_plain(1, 5.0)  # the first may compile
    for _ in range(FEWEST_SAMPLES):
        assert times.wants_plain(1)
        times.note_plain(1, 0.010)
    assert not times.wants_plain(1)
    assert times.note_drafted(1, 5, 9.0) is None, "the first of a size may be recorded, compiled"
    assert times.cost(1, 5) == PRIOR_COST
    for _ in range(5):
        assert abs(times.note_drafted(1, 5, 0.015) - 1.5) < 1e-9
    assert abs(times.cost(1, 5) - 1.5) < 1e-9
    assert abs(times.cost(1, 15) - 1.5) < 1e-9, "a larger one costs as much or more"
    assert times.cost(1, 3) == PRIOR_COST
    assert times.wants_plain(9), "a batch of another size has costs of its own"
    # One pause of the machine does not count as it is, the first time neither.
    assert times.note_drafted(1, 5, 100.0) == pytest.approx(1.5 * MOST_TIMES)
    assert times.cost(1, 5) < 3
    times.note_drafted(1, 15, 100.0)
    assert times.note_drafted(1, 15, 100.0) == pytest.approx(MOST_COST)
    for _ in range(MOST_AGE):
        times.note_drafted(1, 5, 0.015)
    assert times.wants_plain(1), "the cost without drafts is measured anew"


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 15)), min_size=1, max_size=400),
    st.floats(0.5, 12.0),
)
@settings(deadline=None)
def test_what_is_lost_is_bounded_whatever_comes(
    wishes: list[tuple[bool, int]], cost: float
) -> None:
    """Drafts wherever one is wished for and may be taken: at any moment, and after any of them."""
    allowance, lost = Allowance(), 0.0
    most = FIRST_CREDIT + max(0.0, cost - 1)
    for steps, (wished, num_right) in enumerate(wishes):
        if wished and allowance.allows:
            allowance.spend(cost - 1 - num_right)
            lost += cost - 1 - num_right
        allowance.earn()
        assert lost <= most + CREDIT_RATE * (steps + 1) + 1e-9
        assert allowance.credit <= MOST_CREDIT


def test_hostile_drafts_cost_less_than_three_in_a_hundred() -> None:
    """The worst there is: each draft wrong, each taken as soon as it may be."""
    for cost in (1.3, 2.0, 9.0):
        allowance, steps, spent, num_drafts = Allowance(), 0, 0.0, 0
        while steps < 2000:
            if allowance.allows:
                allowance.spend(cost - 1)
                spent, num_drafts = spent + cost - 1, num_drafts + 1
            allowance.earn()
            steps += 1
        assert num_drafts > 1
        assert spent / steps < 0.03


def test_time_that_was_saved_may_be_risked_and_no_more() -> None:
    allowance = Allowance()
    for _ in range(1000):
        allowance.spend(-10.0)
    assert allowance.allows_try
    num_drafts = 0
    while allowance.allows:
        allowance.spend(8.0)
        num_drafts += 1
    assert num_drafts == MOST_CREDIT / 8
    assert not allowance.allows_try


def shadowed(pace: Pace, guesses: list[int], tokens: list[int]) -> Shadow:
    """A chain of guesses, after which tokens come one by one."""
    shadow, generated = Shadow(DraftTree.merged([guesses], len(guesses)), 3), [1, 2, 3]
    for token in tokens:
        generated.append(token)
        shadow.follow(generated, pace)
    return shadow


def test_a_draft_is_paid_for_once_guesses_were_right_in_a_row() -> None:
    pace = Pace()
    assert pace.expected == 0
    shadow = shadowed(pace, [7, 8, 9, 10], [7] * 1)
    assert (pace.expected, shadow.is_over) == (0, False), "one may be chance"
    shadow = shadowed(pace := Pace(), [7, 8, 9, 10], [7, 8][:FIRST_RUN])
    assert pace.expected == FIRST_RUN
    assert pace.num_draft_tokens(15) == 1 + 2 * FIRST_RUN, "short at first"
    shadow = shadowed(pace := Pace(), [7, 8, 9, 10], [7, 8, 9, 10, 11])
    assert (pace.run, shadow.is_over) == (4, True)
    assert pace.expected == 4, "a run goes on over the end of its guesses"
    shadowed(pace, [12, 13], [12, 99])
    assert pace.run == 0


def test_what_is_never_right_is_never_paid_for() -> None:
    pace, draw = Pace(), random.Random(0)
    for _ in range(500):
        shadowed(pace, [7, 8, 9], [draw.choice([1, 2, 3])])
        assert pace.expected == 0


def test_guesses_that_are_right_on_average_count_without_a_run() -> None:
    pace = Pace()
    for _ in range(20):
        shadowed(pace, [7, 8, 9, 10], [7, 8, 9, 99])
        shadowed(pace, [7, 8, 9, 10], [99])
    assert pace.run == 0
    assert 0.8 < pace.expected < 2
    for _ in range(MOST_MISSES):
        pace.observe(0, is_whole=False)
    assert pace.expected == 0, "the text has changed"
    pace.observe(1, is_whole=False)
    assert pace.expected > 0


def test_drafts_grow_while_they_are_right() -> None:
    pace, lengths = Pace(), []
    pace.follow(FIRST_RUN)
    for _ in range(4):
        lengths.append(pace.num_draft_tokens(15))
        pace.follow(lengths[-1])
        pace.observe(lengths[-1], is_whole=True)
    assert lengths == [5, 15, 15, 15]


def test_a_run_must_be_longer_after_drafts_that_did_not_pay() -> None:
    pace = Pace()
    for _ in range(10):
        pace.follow(pace.needed)
        assert pace.expected == pace.needed
        pace.observe(0, is_whole=False)
        pace.judge(paid=False)
    assert pace.needed == LONGEST_RUN
    pace.follow(LONGEST_RUN)
    pace.judge(paid=True)
    pace.observe(0, is_whole=False)
    pace.follow(FIRST_RUN)
    assert pace.expected == FIRST_RUN, "and is as short again once one paid"


def test_a_tree_is_followed_along_any_branch() -> None:
    tree, pace = DraftTree((5, 6, 7), (0, 0, 2)), Pace()  # 5, or 6 and 7
    shadow = Shadow(tree, 0)
    shadow.follow([6], pace)
    assert (shadow.node, shadow.is_over, pace.run) == (2, False, 1)
    shadow.follow([6, 7, 8], pace)
    assert (shadow.node, shadow.is_over, pace.run) == (3, True, 2)
    assert (pace.gain, pace.misses) == (0.3 * 2, 0)
