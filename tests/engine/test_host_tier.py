"""Prefixes that had to make room come back from the host's memory, with the same tokens."""

import re

import pytest
from engine_helpers import tiny_model, uncached
from test_engine import MIXES, build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.config import ConfigError
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_report import plan_report, plan_values
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.models import HybridModel

SIZE = {"context_tokens": 160, "page_tokens": 16, "kv_element_bytes": 4}


def plan_of(model: HybridModel, slabs: int, host_slabs: int, **options: str) -> MemoryPlan:
    size = SIZE | options
    slab = plan_memory(model.config, budget_bytes=1 << 30, **size).layout.slab_bytes
    where = {"budget_bytes": slabs * slab, "host_bytes": host_slabs * slab}
    return plan_memory(model.config, **where, **size)


def engine_of(model: HybridModel, tokenizer: Tokenizer, plan: MemoryPlan) -> Engine:
    config = SchedulerConfig(
        max_request_tokens=plan.longest_context_tokens or 160,
        page_tokens=16,
        min_chunk_tokens=16,
        max_step_tokens=400,
        headroom_tokens=0,
    )
    return Engine(model, tokenizer, plan, config)


@pytest.mark.parametrize("snapshots", ["fp32", "int8"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_conversation_comes_back(mix: str, snapshots: str, tokenizer: Tokenizer) -> None:
    """Others push its prefix out of the device's memory; its second turn hits all the same."""
    model = tiny_model(mix, max_position_embeddings=200)
    slabs = {"ll": 4, "ff": 12, "lsf": 13, "lllf": 13}[mix]
    plan = plan_of(model, slabs, 60, snapshot_dtype=snapshots)
    engine = engine_of(model, tokenizer, plan)
    first, *others = prompts(2, [85] + [90] * 60)
    submit(engine, "first", first, 8, marks=(85,))
    answer = tokens(run(engine)["first"])
    second = [*first, *answer, 7, 8, 9]
    while is_on_device(engine, second):
        submit(engine, f"other {len(others)}", others.pop(), 8)
        run(engine)
    again = submit(engine, "second", second, 8)
    found = tokens(run(engine)["second"])
    assert again.num_cached_tokens >= 80
    counters = engine.cache.host_counters()
    assert counters.num_hits >= 1
    assert counters.hit_tokens >= 64
    if snapshots == "fp32":
        assert found == uncached(model, second, 8)
    engine.cache.clear()
    assert sum(engine.cache.host_usage().num_items) == 0


def is_on_device(engine: Engine, tokens: list[int]) -> bool:
    request = Request("asks", tuple(tokens), 8)
    return engine.cache._index.match(KeyChain(request, 16), len(tokens)).lookup.hit_tokens > 0


def test_without_a_tier_nothing_comes_back(tokenizer: Tokenizer) -> None:
    model = tiny_model("lsf", max_position_embeddings=200)
    engine = build(model, tokenizer)
    assert engine.cache.host_usage() is None
    assert engine.cache.host_counters() is None


def test_a_plan_says_what_the_host_gives() -> None:
    model = tiny_model("lsf")
    plan = plan_of(model, 20, 7)
    slab = plan.layout.slab_bytes
    assert plan_values(plan)["host_bytes"] == plan.host_bytes == 7 * slab
    assert "7 slabs of the host's memory" in plan_report(plan)
    assert "evicted prefixes" not in plan_report(plan_of(model, 20, 0))
    rule = f"host_bytes must be 0 or hold 3 slabs of {slab:,} = {3 * slab:,} bytes, got {slab:,}"
    with pytest.raises(ConfigError, match=re.escape(rule)):
        plan_of(model, 20, 1)
