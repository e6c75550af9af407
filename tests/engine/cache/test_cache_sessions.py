"""Sessions: what a conversation keeps, for how long, and who may take it."""

import random

import pytest
from cache_helpers import FULL, HYBRID, LINEAR, P, Runner, blocks, tiny_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache import SessionCache, SessionLimits


class Clock:
    """Seconds that a test turns on by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def runner(num_slabs: int = 24, *, clock: Clock | None = None, layers=HYBRID, **limits) -> Runner:
    plan = tiny_plan(num_slabs, layer_types=layers)
    options = {"limits": SessionLimits(**limits), "clock": clock or Clock()}
    return Runner(SessionCache(plan, headroom_tokens=0, **options))


def crowd(run: Runner, num: int = 40) -> None:
    """Other people's prompts, more than memory keeps."""
    draw = random.Random(0)
    for _ in range(num):
        run.serve(tuple(draw.randrange(1000, 9000) for _ in range(6 * P)))


QUESTION = blocks("system")
NEXT = (*QUESTION, *blocks("answer without its reasoning"[:4]))


@pytest.mark.parametrize("layers", [HYBRID, (LINEAR,), (FULL,)])
def test_a_session_keeps_its_turn_through_a_crowd(layers) -> None:
    """The template drops the reasoning: the next turn leaves the path where the answer began."""
    hits = {}
    for session in (None, "mine"):
        run = runner(layers=layers)
        marks, output = (len(QUESTION),), blocks("thinking aloud")[: 5 * P]
        run.serve((*QUESTION, 7), marks=marks, output=output, session=session)
        crowd(run, 120)
        hits[session] = run.serve(NEXT, session=session)
        run.manager.clear()
        run.check_nothing_is_left()
    assert hits == {None: 0, "mine": 6 * P}


@pytest.mark.parametrize("marks", [(), (2 * P,), (2 * P, 4 * P), (6 * P,)])
def test_marks_that_lie_anywhere_cost_no_session_its_prompt(marks: tuple[int, ...]) -> None:
    run = runner(60)
    prompt = (*QUESTION, 7)
    run.serve(prompt, marks=marks, output=blocks("thinking aloud"), session="mine")
    crowd(run, 120)
    assert run.serve(NEXT, session="mine") == 6 * P


def test_a_turn_that_ends_long_before_the_prompt_is_kept() -> None:
    run = runner(60)
    opened = (*QUESTION, *blocks("opening"))
    marks = (len(QUESTION),)
    run.serve(opened, marks=marks, output=blocks("thinking aloud"), session="mine")
    crowd(run, 120)
    assert run.serve(NEXT, session="mine") == 6 * P


def test_the_end_of_an_output_is_kept_too() -> None:
    run = runner(60)
    output = blocks("abcdefghij")
    run.serve(QUESTION, marks=(len(QUESTION),), output=output, session="mine")
    crowd(run, 120)
    # Decoding keeps its state every 64 tokens.
    assert run.serve((*QUESTION, *output, 1)) == 12 * P
    assert run.manager.num_sessions == 1


def test_a_session_belongs_to_its_salt() -> None:
    run = runner()
    run.serve(QUESTION, session="mine", salt=b"a")
    run.serve(blocks("other"), session="mine", salt=b"b")
    assert run.manager.num_sessions == 2
    crowd(run)
    assert run.serve(QUESTION[:-1], salt=b"b") == 0
    assert run.serve((*QUESTION, 1), salt=b"a") >= 5 * P


def test_the_one_idle_longest_makes_room() -> None:
    run = runner(60, max_sessions=2)
    first, second, third = (blocks(text) for text in ("aaab", "ccc", "eee"))
    for name, prompt in (("1", first), ("2", second), ("1", first), ("3", third)):
        run.serve((*prompt, 1), session=name)
    assert run.manager.num_sessions == 2
    crowd(run, 120)
    found = [run.serve((*prompt, 1)) for prompt in (first, second, third)]
    assert found == [4 * P, 0, 3 * P]


def test_a_session_expires() -> None:
    clock = Clock()
    run = runner(60, clock=clock, idle_s=10)
    run.serve((*QUESTION, 1), session="old")
    clock.now_s = 6
    run.serve((*blocks("abc"), 1), session="new")
    clock.now_s = 12
    assert run.manager.num_sessions == 1
    crowd(run, 120)
    assert run.serve((*QUESTION, 1)) == 0
    assert run.serve((*blocks("abc"), 1)) == 3 * P


def test_sessions_hold_half_of_the_memory_at_most() -> None:
    run = runner(24)
    for n in range(40):
        run.serve((*blocks(f"{n:04}"), 1), session=str(n))
    plan = run.manager.plan
    each = 4 * plan.page_bytes + plan.snapshot_bytes
    assert run.manager.num_sessions == plan.budget_bytes // 2 // each
    assert 1 < run.manager.num_sessions < 40
    long = tuple(range(P * 8 * 15))
    run.serve(long, session="long")
    assert run.manager.num_sessions == 0, "what is more than half is not kept"


def test_a_request_that_is_alone_gets_all_that_the_plan_promised() -> None:
    run = runner(12)
    for n in range(5):
        run.serve((*blocks(f"{n:04}"), 1), session=str(n))
    assert run.manager.num_sessions > 1
    longest = run.manager.plan.longest_context_tokens
    assert longest is not None
    request = run.request(tuple(range(longest)))
    assert run.start(request) == 0
    run.prefill(request)
    assert run.manager.num_sessions == 0


def test_no_sessions_are_kept_where_none_may_be() -> None:
    run = runner(max_sessions=0)
    run.serve(QUESTION, session="mine")
    assert run.manager.num_sessions == 0
    run.check_nothing_is_left()


TURN = st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 70), st.booleans())


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(TURN, min_size=1, max_size=25), layers=st.sampled_from([HYBRID, (FULL,)]))
def test_whatever_conversations_do_nothing_is_left(turns, layers) -> None:
    clock = Clock()
    # Twice the pages of a request: it holds its own of a block that another has published first.
    run = runner(32, clock=clock, layers=layers, max_sessions=3, idle_s=4)
    histories = [()] * 4
    for who, num_blocks, num_new, drops in turns:
        clock.now_s += 1
        prompt = (*histories[who], *(who,) * (num_blocks * 7))[-(10 * P) :]
        output = tuple(range(num_new))
        run.serve(prompt, marks=(len(prompt),), output=output, session=str(who))
        histories[who] = prompt if drops else (*prompt, *output)
        run.check()
    run.manager.clear()
    run.check_nothing_is_left()
