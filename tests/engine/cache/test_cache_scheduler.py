"""The manager under the real scheduler, short of memory."""

from random import Random

import pytest
from cache_helpers import FULL, HYBRID, LINEAR, P, Runner, tiny_plan

from sevenfold.engine.cache import CacheManager
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import PrefillChunk, Scheduler, SchedulerConfig, Step

STEPS = 2000


class Engine:
    """Steps a scheduler, and runs its rows in simulated memory."""

    def __init__(self, runner: Runner, random: Random) -> None:
        self.runner, self.random = runner, random
        self.now_s = 0.0
        config = SchedulerConfig(
            max_request_tokens=runner.manager.plan.longest_context_tokens or 300,
            page_tokens=P,
            max_step_tokens=96,
            max_running=6,
            max_prefills=3,
            min_chunk_tokens=P,
            max_waiting=1000,
            headroom_tokens=20,
        )
        self.config = config
        self.scheduler = Scheduler(runner.manager, config, clock=lambda: self.now_s)
        self.ended: list[Request] = []
        self.num_preempted = 0

    def step(self) -> None:
        self.now_s += 0.01
        step = self.scheduler.step()
        self.forget(step)
        rows = [*step.prefills, *step.decodes]
        self.runner.zero()
        for row in rows:
            if row.request.id not in self.runner.open:
                self.runner.adopt(row.request)
        for row in rows:
            self.run(row)
        self.scheduler.let_go()
        self.runner.check()

    def forget(self, step: Step) -> None:
        for request in (*step.preempted, *step.ended):
            self.runner.open.pop(request.id, None)
        self.num_preempted += len(step.preempted)
        self.ended += step.ended

    def run(self, row) -> None:
        request, drafts = row.request, 0
        first = request.num_computed_tokens
        if isinstance(row, PrefillChunk):
            self.runner.run(request, row.end, row.snapshots)
            tokens = [self.token()] if row.yields_token else []
        else:
            drafts = self.random.randint(0, row.draft_tokens)
            # Drafts that are accepted are known before they are computed.
            tokens = [self.token() for _ in range(1 + drafts)]
            request.generated += tokens[:drafts]
            come = [at for at in row.snapshots if at <= first + 1 + drafts]
            self.runner.run(request, first + 1 + drafts, come)
            del request.generated[len(request.generated) - drafts :]
        if self.random.random() < 0.005:
            self.scheduler.fail(request, "a fault of its own")
        else:
            self.scheduler.record(request, tokens, stopped=bool(tokens) and tokens[-1] == 0)
        if request.finish_reason is not None:
            self.runner.open.pop(request.id)

    def token(self) -> int:
        return self.random.choice([0, *[97] * 60])

    def submit(self) -> None:
        prompt = tuple(
            t for letter in "aaaa"[: self.random.randint(0, 4)] for t in [ord(letter)] * P
        )
        prompt += (self.random.choice([98, 99]),) * self.random.randint(1, 60)
        request = Request(
            f"r{self.runner.num_made}",
            prompt,
            self.random.randint(1, 90),
            priority=self.random.randint(0, 2),
            marks=tuple(sorted({self.random.randint(1, len(prompt)) for _ in range(2)})),
            salt=self.random.choice([b"x", b"y"]),
            draft_tokens=self.random.choice([0, 3]),
        )
        self.runner.num_made += 1
        self.scheduler.submit(request)
        if self.random.random() < 0.03:
            self.scheduler.cancel(request.id)


@pytest.mark.parametrize(
    ("layers", "num_slabs", "dtype"),
    [(HYBRID, 9, "fp32"), (HYBRID, 8, "int8"), ((LINEAR,), 9, "fp16"), ((FULL,), 30, "fp32")],
)
def test_nothing_leaks_and_everything_ends(layers, num_slabs, dtype) -> None:
    plan = tiny_plan(num_slabs, layers, dtype, head_dim=64)
    runner = Runner(CacheManager(plan, headroom_tokens=20))
    engine = Engine(runner, Random(repr((layers, dtype))))
    for _ in range(STEPS):
        if engine.scheduler.num_waiting < 4 and engine.random.random() < 0.3:
            engine.submit()
        engine.step()
    while engine.scheduler.has_work:
        engine.step()
    assert len(engine.ended) == runner.num_made
    for request in engine.ended:
        if request.finish_reason == "length":
            assert len(request.generated) == request.max_tokens
        else:
            assert request.finish_reason in ("stop", "cancelled", "error")
            assert request.error in (None, "a fault of its own")
    counters = runner.manager.counters()
    assert counters.num_hits > 20
    assert counters.num_evicted > 20
    assert engine.num_preempted > 5 or not plan.has_pages
    assert runner.manager.num_pinned_items() == (0, 0, 0)
    assert runner.manager.usage().num_items[Tenant.STATE] == 0
    runner.check_nothing_is_left()
