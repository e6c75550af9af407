"""When drafting pays: measured costs, rests that grow, and their end."""

from sevenfold.engine.speculation.pace import (
    FEWEST_SAMPLES,
    FIRST_REST_TOKENS,
    LONGEST_REST_TOKENS,
    MOST_AGE,
    PRIOR_COST,
    Pace,
    StepTimes,
)


def test_costs_are_measured_for_each_size_of_batch() -> None:
    times = StepTimes()
    assert times.wants_plain(1)
    assert times.cost(1) == PRIOR_COST
    for _ in range(FEWEST_SAMPLES):
        times.note(1, 0.010, drafted=False)
    assert not times.wants_plain(1)
    assert times.cost(1) == PRIOR_COST
    for _ in range(5):
        times.note(1, 0.015, drafted=True)
    assert abs(times.cost(1) - 1.5) < 1e-9
    assert times.wants_plain(9), "a batch of another size has costs of its own"
    # One pause of the machine does not count as it is.
    times.note(1, 100.0, drafted=True)
    assert times.cost(1) < 3
    for _ in range(MOST_AGE):
        times.note(1, 0.015, drafted=True)
    assert times.wants_plain(1), "the cost without drafts is measured anew"


def tokens_between_tries(num_accepted: int, cost: float, num_tries: int) -> list[int]:
    pace, waits = Pace(), []
    for _ in range(num_tries):
        waits.append(pace.resting)
        pace.rest(pace.resting)
        assert pace.num_draft_tokens(5) > 0
        pace.observe(num_accepted, cost)
    return waits


def test_what_never_pays_is_tried_less_and_less() -> None:
    waits = tokens_between_tries(0, 1.5, 14)
    rests = [wait for wait in waits if wait]
    assert waits.index(FIRST_REST_TOKENS) <= 3
    assert rests[:3] == [FIRST_REST_TOKENS, 2 * FIRST_REST_TOKENS, 4 * FIRST_REST_TOKENS]
    assert rests[-1] == LONGEST_REST_TOKENS
    # Once it is known not to pay, one token in a hundred and fewer is drafted for in vain.
    assert len(rests) / sum(rests) < 0.01


def test_what_pays_goes_on_and_drafts_more() -> None:
    pace = Pace()
    lengths = []
    for _ in range(8):
        lengths.append(pace.num_draft_tokens(8))
        pace.observe(min(6, lengths[-1]), 1.5)
    assert lengths[0] < lengths[-1] == 8
    assert pace.resting == 0


def test_a_text_that_begins_to_repeat_recovers() -> None:
    pace = Pace()
    for _ in range(6):
        pace.rest(pace.resting)
        pace.observe(0, 1.5)
    assert pace.rest_tokens > FIRST_REST_TOKENS
    assert pace.num_draft_tokens(5) == 0
    pace.rest(pace.resting)
    tried = pace.num_draft_tokens(5)
    assert tried > 0
    pace.observe(tried, 1.5)
    assert (pace.resting, pace.rest_tokens) == (0, FIRST_REST_TOKENS)
    # On the brink it neither rests nor counts as recovered.
    level = Pace(gain=0.52, rest_tokens=64)
    level.observe(0.52, 1.5)
    assert (level.resting, level.rest_tokens) == (0, 64)
