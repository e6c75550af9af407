"""What holds after every history of submissions, steps, cancellations and deadlines."""

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from scheduler_helpers import PAGE
from scheduler_model import Model

LIMITS = st.fixed_dictionaries(
    {
        "num_pages": st.integers(4, 12),
        "num_states": st.sampled_from([1, 3, 5]),
        "max_step_tokens": st.sampled_from([13, 14, 24, 40]),
        "lone_chunk_tokens": st.sampled_from([None, 40, 60]),
        "max_running": st.sampled_from([1, 5, 5]),
        "max_prefills": st.sampled_from([1, 2]),
        "min_chunk_tokens": st.just(PAGE),
        "max_waiting": st.sampled_from([3, 20]),
        "headroom_tokens": st.sampled_from([0, 2, 9]),
        "ageing_s": st.sampled_from([1.0, 10.0]),
    }
)
# Few different prompts, so that prefixes are shared all the time.
PROMPTS = st.tuples(st.integers(1, 30), st.integers(0, 1)).map(lambda a: (a[1], *range(a[0] - 1)))
WISHES = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "max_tokens": st.integers(1, 30),
        "priority": st.sampled_from([0, 0, 0, 1, 3]),
        "patience": st.one_of(st.none(), st.none(), st.none(), st.integers(0, 30)),
        "salt": st.sampled_from([b"a", b"b"]),
        "drafts": st.sampled_from([0, 0, 1, 4]),
    }
)


class History(RuleBasedStateMachine):
    model: Model | None = None

    @initialize(limits=LIMITS)
    def begin(self, limits: dict[str, float]) -> None:
        self.model = Model(limits)

    @rule(wishes=st.lists(WISHES, min_size=1, max_size=6))
    def submit(self, wishes: list[dict]) -> None:
        for wish in wishes:
            self.model.submit(**wish)

    @rule(seconds=st.integers(1, 9))
    def wait(self, seconds: int) -> None:
        self.model.world.clock.now_s += seconds

    @rule()
    def forget_prefixes(self) -> None:
        self.model.world.cache.kept.clear()

    @precondition(lambda self: self.model and self.model.under_way)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.model.cancel(data.draw(st.sampled_from(self.model.under_way)))

    @rule(num_steps=st.integers(1, 8), seed=st.integers(0, 1000))
    def step(self, num_steps: int, seed: int) -> None:
        random = Random(seed)  # not Hypothesis's own, which makes rare outcomes frequent
        for _ in range(num_steps):
            self.model.step(random)

    @invariant()
    def nobody_is_lost(self) -> None:
        if self.model:
            self.model.nobody_is_lost()

    def teardown(self) -> None:
        if self.model:
            self.model.drain()


History.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHistory = History.TestCase


@pytest.mark.parametrize(
    ("headroom_tokens", "num_states", "least"), [(0, 5, 150), (9, 5, 15), (0, 2, 50)]
)
def test_a_crowded_day(headroom_tokens: int, num_states: int, least: int) -> None:
    """Memory is always out, so that preemption is the rule."""
    limits = {"num_pages": 12, "num_states": num_states, "max_step_tokens": 24, "max_running": 5}
    limits |= {"max_prefills": 2, "min_chunk_tokens": PAGE, "headroom_tokens": headroom_tokens}
    model, random = Model(limits), Random(headroom_tokens)
    for _ in range(2000):
        for _ in range(random.choice([0, 0, 0, 1, 2])):
            model.submit(
                prompt=(random.randrange(2), *range(random.randrange(25))),
                max_tokens=random.randint(1, 24),
                priority=random.choice([0, 0, 0, 1, 3]),
                patience=random.choice([None, None, None, 60]),
                salt=random.choice([b"a", b"b"]),
                drafts=random.choice([0, 0, 3]),
            )
        model.world.clock.now_s += random.random()
        model.step(random)
    model.drain()
    assert model.world.scheduler.num_preemptions >= least
