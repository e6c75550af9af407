"""What speculation refuses, and what its memory takes."""

import pytest
from engine_helpers import tiny_model
from speculation_helpers import CHAIN, SMALLER, build, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.config import ConfigError, parse_config
from sevenfold.engine.cache import Fresh
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.memory_report import plan_report, plan_values
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.speculation import (
    RING_TOKENS,
    DraftModel,
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)
from sevenfold.engine.storage import LinearStorage, Storage
from sevenfold.models import preset


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"draft_token": 3}, "did you mean draft_tokens"),
        ({"draft_tokens": 16}, "draft_tokens"),
        ({"draft_tokens": 2, "branches": 3}, "branches must be at most draft_tokens = 2, got 3"),
        ({"max_match_tokens": 1}, "max_match_tokens must be at least min_match_tokens = 2, got 1"),
    ],
)
def test_configurations_are_strict(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(PromptLookupConfig, values, "speculation")
    with pytest.raises(ConfigError, match="DraftModelConfig: memory_bytes must be given"):
        DraftModelConfig(draft_tokens=3)


def test_what_does_not_go_together_is_refused(tokenizer: Tokenizer) -> None:
    model = tiny_model("lsf")
    draft = DraftModel(model, tokenizer)
    with pytest.raises(ConfigError, match="draft must be a DraftModel with a DraftModelConfig"):
        build(model, tokenizer, SMALLER)
    with pytest.raises(ConfigError, match="draft must be None with a PromptLookupConfig"):
        build(model, tokenizer, CHAIN, draft)
    with pytest.raises(ConfigError, match="draft must be None without speculation"):
        build(model, tokenizer, None, draft)
    with pytest.raises(ConfigError, match="must be a PromptLookupConfig or a DraftModelConfig"):
        build(model, tokenizer, SpeculationConfig())
    plan, config = size_engine(model, budget_bytes=1 << 20)
    with pytest.raises(ConfigError, match=r"plan.ring_tokens must be at least draft_tokens \+ 1"):
        Engine(model, tokenizer, plan, config, speculation=CHAIN)


def test_a_model_without_states_needs_no_rings(tokenizer: Tokenizer) -> None:
    model = tiny_model("sf")
    plan = plan_memory(model.config, budget_bytes=1 << 20, context_tokens=50, kv_element_bytes=4)
    config = SchedulerConfig(max_request_tokens=50, page_tokens=64)
    engine = Engine(model, tokenizer, plan, config, speculation=CHAIN)
    submit(engine, "a", [1, 2, 3], 5)
    assert len(tokens(run(engine)["a"])) == 5


def test_drafts_are_part_of_the_budget() -> None:
    config = preset("minimax-text-01")
    size = {"budget_bytes": 150 << 30, "context_tokens": 1_000_000}
    plain, drafting = (plan_memory(config, **size, ring_tokens=n) for n in (0, RING_TOKENS))
    assert plain.ring_bytes == 0
    # 70 layers x 64 heads x (16 keys and values of 128 in bf16, and a count)
    assert drafting.ring_bytes == 70 * 64 * (2 * 16 * 128 * 2 + 4)
    assert drafting.layout.slab_bytes >= drafting.state_bytes + drafting.ring_bytes
    assert drafting.request_bytes(0) == plain.request_bytes(0) + drafting.ring_bytes
    assert drafting.concurrency(8192) < plain.concurrency(8192)
    assert "drafts              35.0 MiB beside each state, for 16 tokens" in plan_report(drafting)
    assert "drafts" not in plan_report(plain)
    assert plan_values(drafting)["ring_bytes"] == drafting.ring_bytes


def test_rings_lie_in_their_state_and_nowhere_else() -> None:
    model = tiny_model("lsl")
    size = {"budget_bytes": 1 << 18, "context_tokens": 50, "kv_element_bytes": 4}
    plan = plan_memory(model.config, **size, ring_tokens=5)
    storage = Storage(model.config, plan, device=model.device, dtype=model.dtype)
    linear = [layer for layer in storage.layers if isinstance(layer, LinearStorage)]
    views = [view for layer in linear for view in layer.drafts.tensors()]
    for item in (1, 3):
        for n, view in enumerate(views):
            view[item] = 10 * item + n
    for item in (1, 3):
        assert all(bool((view[item] == 10 * item + n).all()) for n, view in enumerate(views))
    assert all(not view[item].any() for view in views for item in (0, 2, 4))
    kept = 2 * plan.layout.places[Tenant.SNAPSHOT]  # in a slab of its own
    storage.snapshot([3], [kept])
    storage.restore([kept], [1])
    assert all(not layer.drafts.count[1].any() for layer in linear), "it lacks nothing"
    assert all(bool((layer.states[1] == layer.states[3]).all()) for layer in linear)
    storage.zero(Fresh([3], []))
    assert not any(view[3].any() for view in views)


def test_sizing_takes_speculation_out_of_the_budget() -> None:
    model = tiny_model("lsf", max_position_embeddings=1000)
    plain, _ = size_engine(model, budget_bytes=1 << 20)
    copying, _ = size_engine(model, budget_bytes=1 << 20, speculation=PromptLookupConfig())
    decoding, _ = size_engine(
        model, budget_bytes=1 << 20, speculation=DraftModelConfig(memory_bytes=1 << 18)
    )
    assert (plain.ring_tokens, copying.ring_tokens) == (0, RING_TOKENS)
    assert decoding.budget_bytes == copying.budget_bytes - (1 << 18)
