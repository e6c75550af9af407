"""Memory and limits for serving a model, from a budget."""

import pytest
from engine_helpers import tiny_model

from sevenfold.config import ConfigError
from sevenfold.engine.sizing import (
    PAGE_TOKENS,
    default_budget_bytes,
    lone_chunk_tokens,
    size_engine,
)
from sevenfold.models import preset


def test_the_limit_is_the_models_or_what_the_budget_holds() -> None:
    model = tiny_model("lf", max_position_embeddings=1000)
    plan, config = size_engine(model, budget_bytes=1 << 20)
    assert (config.max_request_tokens, config.page_tokens) == (1000, PAGE_TOKENS)
    assert plan.budget_bytes == 1 << 20
    small, tight = size_engine(model, budget_bytes=4 * plan.layout.slab_bytes)
    assert tight.max_request_tokens == small.longest_context_tokens < 1000
    _, linear = size_engine(tiny_model("ll", max_position_embeddings=1000), budget_bytes=1 << 20)
    assert linear.max_request_tokens == 1000


def test_what_is_asked_for_is_kept_or_refused() -> None:
    model = tiny_model("lf", max_position_embeddings=1000)
    plan, config = size_engine(model, budget_bytes=1 << 20, context_tokens=300)
    assert config.max_request_tokens == 300
    slab = plan.layout.slab_bytes
    with pytest.raises(ConfigError, match="budget_bytes must hold one request of 300 tokens"):
        size_engine(model, budget_bytes=2 * slab, context_tokens=300)
    with pytest.raises(ConfigError, match="must lie in 1 to max_position_embeddings = 1000, got 0"):
        size_engine(model, context_tokens=0)


def test_the_default_budget_is_a_share_of_what_is_free() -> None:
    assert 0 < default_budget_bytes(tiny_model("lf")) <= 4 << 30


def test_a_lone_chunk_on_a_gpu_is_bounded_by_memory_time_and_what_pays() -> None:
    small, large = preset("bench-2b"), preset("minimax-text-01")
    assert lone_chunk_tokens(small, 16 << 30) == 32_768
    # e (6 D + 5 H D_h + k (2 D + 4 F)) + 20 H D_h bytes a token, of which half may be taken.
    token = 2 * (6 * 2048 + 5 * 2048 + 2 * (2 * 2048 + 4 * 1792)) + 20 * 2048
    # And keys and values of 65,536 tokens, where a layer attends to all.
    gathered = 2 * 2 * 65_536 * small.num_key_value_heads * small.head_dim
    assert lone_chunk_tokens(small, gathered + 2 * 16_384 * token) == 16_384
    assert lone_chunk_tokens(small, gathered + 2 * 16_384 * token - 2) == 8192
    assert lone_chunk_tokens(small, 0) == 8192
    assert lone_chunk_tokens(large, 1 << 40) == 8192
    assert lone_chunk_tokens(tiny_model("lf").config, 1 << 40) == 32_768


def test_a_cpu_keeps_to_its_steps() -> None:
    _, config = size_engine(tiny_model("lf"), budget_bytes=1 << 20)
    assert (config.max_step_tokens, config.lone_chunk_tokens) == (2048, None)
