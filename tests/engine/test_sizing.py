"""Memory and limits for serving a model, from a budget."""

import pytest
from engine_helpers import tiny_model

from sevenfold.config import ConfigError
from sevenfold.engine.sizing import PAGE_TOKENS, default_budget_bytes, size_engine


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
