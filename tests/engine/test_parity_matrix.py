"""Greedy tokens are the same whatever the engine does: the product of what it can do, tiny, fp32.

The default run takes every STRIDE-th case, so that each value of each axis is met; the slow run
takes all.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
from device_helpers import FakeCapture, new_runner
from engine_helpers import tiny_model, uncached
from test_engine import prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine import worker as worker_module
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import RING_TOKENS, PromptLookupConfig
from sevenfold.models import HybridModel

LAYERS, NUM_TOKENS, STRIDE = "lsl", 8, 13
CHAIN = PromptLookupConfig(draft_tokens=4, min_match_tokens=1, adaptive=False)
TREE = PromptLookupConfig(draft_tokens=5, branches=2, min_match_tokens=1, adaptive=False)


@dataclass(frozen=True)
class Case:
    """cached: whether prompts share a salt, and so prefixes. short: of memory, so that requests are
    preempted or wait. invariant: batch-invariant mode, which drafts nothing."""

    cached: bool
    drafts: PromptLookupConfig | None
    chunk_tokens: int
    together: bool
    short: bool
    graphs: bool
    host: bool
    invariant: bool

    def __str__(self) -> str:
        how = {CHAIN: "chain", TREE: "tree", None: "plain"}[self.drafts]
        flags = [name for name in ("cached", "together", "short", "graphs", "host", "invariant")
                 if getattr(self, name)]  # fmt: skip
        return "-".join([how, str(self.chunk_tokens), *flags])


AXES = ([False, True], [None, CHAIN, TREE], [16, 64], *[[False, True]] * 5)
ALL = [Case(*values) for values in product(*AXES)]
CASES = [case for case in ALL if not (case.invariant and case.drafts)]
QUICK = CASES[::STRIDE]


@cache
def model() -> HybridModel:
    return tiny_model(LAYERS, max_position_embeddings=200)


@cache
def texts() -> tuple[tuple[int, ...], ...]:
    """Prompts that share a head and repeat themselves, and one that goes on from another's end."""
    found = [[*text, *text[-9:]] for text in prompts(4, [3, 40, 21], shared=34)]
    found.append([*found[1], *prompts(5, [6])[0]])
    return tuple(tuple(text) for text in found)


@cache
def wanted() -> list[list[int]]:
    return [uncached(model(), list(text), NUM_TOKENS) for text in texts()]


def engine_of(case: Case, tokenizer: Tokenizer) -> Engine:
    size = {"context_tokens": 128, "page_tokens": 16, "kv_element_bytes": 4}
    size["ring_tokens"] = RING_TOKENS if case.drafts else 0
    layout = plan_memory(model().config, budget_bytes=1 << 30, **size).layout
    slabs = 1 + 2 + -(-144 // (16 * layout.places[1])) if case.short else 60
    host = 40 * layout.slab_bytes if case.host else 0
    plan = plan_memory(
        model().config, budget_bytes=slabs * layout.slab_bytes, host_bytes=host, **size
    )
    config = SchedulerConfig(
        max_request_tokens=min(128, plan.longest_context_tokens),
        page_tokens=16,
        min_chunk_tokens=case.chunk_tokens,
        max_step_tokens=8 + 4 * case.chunk_tokens,
        max_prefills=4,
        max_running=4,
        headroom_tokens=0,
        batch_invariant=case.invariant,
    )
    engine = Engine(model(), tokenizer, plan, config, speculation=case.drafts)
    if case.drafts:
        # Outputs are short, and a step begun ahead passes a guess over: for both together see
        # speculation/test_speculation_ahead.py.
        engine._worker.ahead = None
    return engine


def check(case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.graphs:
        monkeypatch.setattr(
            worker_module,
            "make_runner",
            lambda model, storage, *_, **__: new_runner(model, storage, FakeCapture(), (2, 4)),
        )
    engine = engine_of(case, tokenizer)
    idle = engine.cache.usage()
    found: dict[str, list[int]] = {}
    # Twice: the second time everything may have been cached, and pushed out again.
    for turn in range(2):
        for n, text in enumerate(texts()):
            salt = b"shared" if case.cached else f"{turn} {n}".encode()
            submit(engine, f"{turn} {n}", list(text), NUM_TOKENS, salt=salt, priority=n)
            if not case.together:
                found |= {name: tokens(events) for name, events in run(engine).items()}
        found |= {name: tokens(events) for name, events in run(engine).items()}
    for turn in range(2):
        assert [found[f"{turn} {n}"] for n in range(len(texts()))] == wanted()
    hits = engine.counters().hit_tokens
    assert hits == 0 or case.cached
    counters = engine.speculation_counters()
    assert counters is None or counters.num_accepted_tokens > 0
    assert engine.scheduler.num_preemptions == 0 or not case.invariant
    engine.cache.clear()
    assert engine.cache.usage() == idle


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_tokens(case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, tokenizer, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK], ids=str)
def test_tokens_of_the_rest(
    case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tokenizer, monkeypatch)


def test_the_quick_run_meets_every_value() -> None:
    for name, values in zip(Case.__dataclass_fields__, AXES, strict=True):
        assert {str(getattr(case, name)) for case in QUICK} == {str(value) for value in values}
