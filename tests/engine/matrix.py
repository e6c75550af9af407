"""The parity matrix: all that an engine can do at once, and what shows that it did it."""

import copy
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product

import pytest
import torch
from covering import covering
from device_helpers import FakeCapture, new_runner
from speculation_helpers import repeating
from tokenizers import Tokenizer

from sevenfold.engine import SamplingParams
from sevenfold.engine import worker as worker_module
from sevenfold.engine.ahead import Begun
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import SchedulerConfig, Step
from sevenfold.engine.speculation import (
    RING_TOKENS,
    DraftModel,
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import Checked, DraftRow
from sevenfold.models import HybridModel

# More than half of a page: every output needs one more than its prompt.
NUM_TOKENS, PAGE_TOKENS, CONTEXT_TOKENS = 10, 16, 144
MAX_RUNNING, MAX_PREFILLS = 4, 2
DRAFTS: dict[str, SpeculationConfig | None] = {
    "plain": None,
    "chain": PromptLookupConfig(draft_tokens=3, min_match_tokens=1, adaptive=False),
    "tree": PromptLookupConfig(draft_tokens=5, branches=2, min_match_tokens=1, adaptive=False),
    "model": DraftModelConfig(
        draft_tokens=3, adaptive=False, memory_bytes=1 << 22, context_tokens=CONTEXT_TOKENS
    ),
}
MEMORY = ("ample", "evicting", "preempting")


@dataclass(frozen=True)
class Case:
    """What an engine is made to do.

    drafts: a key of DRAFTS. chunk_tokens: least of a prompt in a step. mix: requests come one
    after another ends, all together, or later ones, which rank first, while earlier ones run.
    memory: enough for all that is asked; for all that runs, so that prefixes have to go; or for
    less, so that requests have to. cached: whether requests may go on from prefixes. graphs:
    whether steps are recorded, and begun ahead. host: prefixes that make room go to the host's
    memory. invariant: batch-invariant mode.
    """

    drafts: str
    chunk_tokens: int
    mix: str
    memory: str
    cached: bool
    graphs: bool
    host: bool
    invariant: bool

    def __str__(self) -> str:
        flags = [name for name in ("cached", "graphs", "host", "invariant") if getattr(self, name)]
        return "-".join([self.drafts, str(self.chunk_tokens), self.mix, self.memory, *flags])

    @property
    def is_possible(self) -> bool:
        """Whether each value can take effect beside the others."""
        if self.invariant and (self.drafts != "plain" or self.memory == "preempting"):
            return False  # refused, and never done
        if self.mix == "alone" and self.memory == "preempting":
            return False  # nobody has to go for itself
        return not self.host or (self.cached and self.memory != "ample")


AXES = (
    tuple(DRAFTS),
    (16, 64),
    ("alone", "together", "later"),
    MEMORY,
    *[(False, True)] * 4,
)
STRENGTH = 3
CASES = [case for values in product(*AXES) if (case := Case(*values)).is_possible]
QUICK = [Case(*values) for values in covering([astuple(case) for case in CASES], STRENGTH)]
REST = [case for case in CASES if case not in set(QUICK)]


LOUD = range(40, 44)


def outspoken(model: HybridModel) -> HybridModel:
    """A model that says a few tokens often: what it said before foretells some of its outputs."""
    with torch.no_grad():
        model.lm_head.weight[list(LOUD)] *= 3.0
    return model


def nearly(model: HybridModel) -> HybridModel:
    """A model that often, but not always, agrees with another."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight += 0.1 * weight.std() * noise
    return other


# Prompts that share a head, in which each loud token follows each: there is more than one guess.
# Each ends so near a page's border that its output crosses it.
HEAD = [*repeating(0, [50])[0], *(LOUD["abcd".index(c)] for c in "aabacadbbcbdccdd")]
TEXTS = [[*HEAD, *tail] for tail in repeating(1, [9, 11, 7, 10])]
# What pushes others' prefixes out.
FILLING = repeating(2, [140, 140, 140])


def fake_graphs(case: Case, monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    """What stands for recorded steps on a CPU, in engines that are made from now on."""
    captured = FakeCapture()
    if case.graphs:
        # In batch-invariant mode all steps have one size.
        sizes = (MAX_RUNNING,) if case.invariant else (2, MAX_RUNNING)
        monkeypatch.setattr(
            worker_module,
            "make_runner",
            lambda model, storage, *_, **__: new_runner(model, storage, captured, sizes),
        )
    return captured


def engine_of(case: Case, model: HybridModel, draft: HybridModel, tokenizer: Tokenizer) -> Engine:
    plan = plan_of(case, model)
    config = SchedulerConfig(
        max_request_tokens=min(CONTEXT_TOKENS, plan.longest_context_tokens or CONTEXT_TOKENS),
        page_tokens=PAGE_TOKENS,
        min_chunk_tokens=case.chunk_tokens,
        max_step_tokens=MAX_RUNNING + MAX_PREFILLS * case.chunk_tokens,
        max_prefills=MAX_PREFILLS,
        max_running=MAX_RUNNING,
        headroom_tokens=0,
        batch_invariant=case.invariant,
    )
    drafts = DRAFTS[case.drafts]
    smaller = DraftModel(draft, tokenizer) if isinstance(drafts, DraftModelConfig) else None
    records = model.device.type == "cuda" and not case.graphs
    return Engine(
        model,
        tokenizer,
        plan,
        config,
        speculation=drafts,
        draft=smaller,
        decode_batch_sizes=() if records else None,
    )


def plan_of(case: Case, model: HybridModel) -> MemoryPlan:
    size = {
        "context_tokens": CONTEXT_TOKENS,
        "page_tokens": PAGE_TOKENS,
        "kv_element_bytes": model.dtype.itemsize,
        "ring_tokens": RING_TOKENS if DRAFTS[case.drafts] else 0,
    }
    layout = plan_memory(model.config, budget_bytes=1 << 30, **size).layout
    needs = zip((Tenant.STATE, Tenant.PAGE), _items(case), strict=True)
    slabs = 1 + sum(layout.num_slabs_for(tenant, count) for tenant, count in needs)
    host = 80 * layout.slab_bytes if case.host else 0
    budget = slabs * layout.slab_bytes
    return plan_memory(model.config, budget_bytes=budget, host_bytes=host, **size)


def _items(case: Case) -> tuple[int, int]:
    """How many states and pages there is memory for."""
    match case.memory:
        case "ample":
            return MAX_RUNNING, 100
        case "evicting":
            return MAX_RUNNING, 26
    # All with one head, or two with nothing in common, but for a page that one of them needs next.
    return (MAX_RUNNING, 9) if case.cached else (2, 10)


class Run:
    """A case's requests: the head alone, all of TEXTS, what fills the memory, and TEXTS again.

    steps: all that the scheduler planned. checked: all drafts. num_ahead: steps begun ahead.
    """

    def __init__(self, case: Case, engine: Engine) -> None:
        self.case, self.engine = case, engine
        self.requests: dict[str, Request] = {}
        self.steps: list[Step] = []
        self.checked: list[DraftTree] = []
        self.num_ahead = 0
        self._watch()

    def run(self) -> None:
        idle = self.engine.cache.usage()
        self._submit("head", HEAD, 1)
        self._finish()
        self._turn(0)
        if self.case.memory != "ample":
            for n, text in enumerate(FILLING):
                self._submit(f"filling {n}", text, 1)
            self._finish()
        self._turn(1)
        self.usage = self.engine.cache.counters()
        self.engine.cache.clear()
        assert self.engine.cache.usage() == idle

    def check_effects(self) -> None:
        """Fail unless every value of the case had its effect."""
        self._check_mix()
        self._check_memory()
        self._check_cache()
        self._check_drafts()
        longest = max(chunk.end - chunk.first for step in self.steps for chunk in step.prefills)
        assert longest <= 2 * self.case.chunk_tokens + MAX_RUNNING
        assert longest > 16 or self.case.chunk_tokens == 16
        if self.engine._worker.ahead is None:
            assert self.num_ahead == 0
        elif self.case.drafts == "plain" or (self.case.mix == "alone" and not self._has_model):
            assert self.num_ahead > 0

    @property
    def turns(self) -> list[list[Request]]:
        """The requests of TEXTS, twice."""
        return [[self.requests[f"{turn} {n}"] for n in range(len(TEXTS))] for turn in range(2)]

    def _check_mix(self) -> None:
        decoding = max(len(step.decodes) for step in self.steps)
        both = any(step.decodes and step.prefills for step in self.steps)
        assert (decoding == 1 and not both) if self.case.mix == "alone" else decoding > 1
        assert both or self.case.mix != "later"

    def _check_memory(self) -> None:
        preempted = [r for turn in self.turns for r in turn if r.num_preemptions]
        assert bool(preempted) == (self.case.memory == "preempting")
        assert bool(self.usage.num_evicted) == (self.case.memory != "ample")
        if preempted:
            cached = [r for r in preempted if r.num_cached_tokens]
            assert bool(cached) == self.case.cached
            assert self.engine.scheduler.num_recomputed_tokens > 0

    def _check_cache(self) -> None:
        first, second = ([r.num_cached_tokens for r in turn] for turn in self.turns)
        assert bool(sum(first)) == bool(self.usage.hit_tokens) == self.case.cached
        if self.case.cached and (self.case.memory == "ample" or self.case.host):
            assert sum(second) > 0
        host = self.engine.cache.host_counters()
        assert (host is not None) == self.case.host
        assert host is None or host.hit_tokens > 0

    def _check_drafts(self) -> None:
        counters = self.engine.speculation_counters()
        assert (counters is None) == (self.case.drafts == "plain")
        if counters is not None:
            assert 0 < counters.num_accepted_tokens < counters.num_drafted_tokens
            branching = [tree for tree in self.checked if len(set(tree.parents)) < len(tree)]
            assert bool(branching) == (self.case.drafts == "tree")

    @property
    def _has_model(self) -> bool:
        return isinstance(DRAFTS[self.case.drafts], DraftModelConfig)

    def _watch(self) -> None:
        plan, launch = self.engine.scheduler.step, self.engine._ahead.launch
        check = self.engine._worker.check

        def planned() -> Step:
            self.steps.append(plan())
            return self.steps[-1]

        def launched(*args) -> Begun | None:
            begun = launch(*args)
            self.num_ahead += begun is not None
            return begun

        def checked(drafts: Sequence[DraftRow]) -> Checked:
            self.checked += [draft.tree for draft in drafts]
            return check(drafts)

        self.engine.scheduler.step, self.engine._ahead.launch = planned, launched
        self.engine._worker.check = checked

    def _turn(self, turn: int) -> None:
        for n, text in enumerate(TEXTS):
            self._submit(f"{turn} {n}", text, NUM_TOKENS, n if self.case.mix == "later" else 0)
            match self.case.mix:
                case "alone":
                    self._finish()
                case "later":
                    self.engine.step()
                    self.engine.step()
        self._finish()

    def _submit(self, name: str, text: list[int], num_tokens: int, priority: int = 0) -> None:
        # Without a salt of its own, a request that takes no prefix shares the pages of equal ones.
        how = {} if self.case.cached else {"max_cached_tokens": 0, "salt": name.encode()}
        request = Request(name, tuple(text), num_tokens, priority=priority, **how)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(request, params)
        self.requests[name] = request

    def _finish(self) -> None:
        for _ in range(500):
            if not self.engine.has_work:
                return
            self.engine.step()
        raise AssertionError("the engine must come to an end in 500 steps")
