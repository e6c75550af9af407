"""Memory plans against the model's accounting and against an arena that is really filled."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.config import ConfigError
from sevenfold.engine.cache import Arena
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_cost import PrefillCost
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.memory_report import plan_report, plan_values
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.models import ModelConfig, preset
from sevenfold.models.accounting import kv_bytes, prefill_flops, state_bytes

MIB, GIB = 1 << 20, 1 << 30
# Of the released model's heads: how many remember up to 730 tokens, up to 7,933, and more.
AUTO = (4202 * (128**2 + 4 * 128) + 264 * (2 * 128**2 + 4) + 14 * 4 * 128**2) / MIB


@st.composite
def configs(draw) -> ModelConfig:
    kinds = ["linear_attention", "full_attention", "sliding_attention"]
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=9))
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        layer_types=tuple(layers),
        num_attention_heads=draw(st.sampled_from([2, 4, 6])),
        num_key_value_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([8, 16, 24, 96, 128])),
        intermediate_size=16,
        rotary_dim=8,
        sliding_window=100 if "sliding_attention" in layers else None,
    )


PLANS = st.builds(
    lambda config, page, state, dtype, slabs: plan_memory(
        config,
        budget_bytes=slabs * MIB,
        context_tokens=1,
        page_tokens=page,
        state_dtype=state,
        snapshot_dtype=dtype,
    ),
    configs(),
    st.sampled_from([16, 32, 48, 64]),
    st.sampled_from(["fp32", "fp16", "int8"]),
    st.sampled_from(["fp32", "fp16", "int8", "auto"]),
    st.integers(20, 60),
)


@settings(max_examples=150, deadline=None)
@given(plan=PLANS)
def test_items_fit_their_strides_and_slabs_the_budget(plan: MemoryPlan) -> None:
    layout = plan.layout
    assert layout.num_slabs * layout.slab_bytes <= plan.budget_bytes
    assert layout.slab_bytes % 512 == 0
    sizes = (plan.state_bytes, plan.page_bytes, plan.snapshot_bytes)
    for tenant, size in zip(Tenant, sizes, strict=True):
        stride = layout.stride_bytes(tenant)
        assert (stride > 0) == (size > 0)
        assert stride >= size
        assert stride % 16 == 0


@settings(max_examples=60, deadline=None)
@given(config=configs(), page=st.sampled_from([16, 64]))
def test_bytes_are_the_accounting_s(config: ModelConfig, page: int) -> None:
    plan = plan_memory(config, budget_bytes=GIB, context_tokens=1, page_tokens=page)
    assert plan.state_bytes == state_bytes(config)
    # Within the window a page holds what accounting counts.
    assert plan.page_bytes == kv_bytes(config, page)
    assert plan.request_bytes(page) == state_bytes(config) + kv_bytes(config, page)


@settings(max_examples=100, deadline=None)
@given(config=configs(), num_tokens=st.integers(0, 5000))
def test_cost_is_the_accounting_s(config: ModelConfig, num_tokens: int) -> None:
    assert PrefillCost.of(config).flops(num_tokens) == prefill_flops(config, num_tokens)


@settings(max_examples=20, deadline=None)
@given(plan=PLANS, context=st.integers(1, 3000))
def test_as_many_requests_fit_as_the_plan_says(plan: MemoryPlan, context: int) -> None:
    def fits(count: int) -> bool:
        arena = Arena(plan.layout)
        states = arena.take(Tenant.STATE, count * plan.has_states)
        pages = arena.take(Tenant.PAGE, count * plan.num_pages(context))
        return states is not None and pages is not None

    count = plan.concurrency(context)
    assert fits(count)
    assert not fits(count + 1)


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_the_longest_context_is_the_longest(plan: MemoryPlan) -> None:
    longest = plan.longest_context_tokens
    if longest is None:
        assert not plan.has_pages
        return
    assert plan.concurrency(longest) >= 1
    assert plan.concurrency(longest + 1) == 0


@pytest.mark.parametrize(
    ("dtype", "snapshot_mib", "snapshots", "slab_mib"),
    # fp16: 140 MiB, and a scale of 4 bytes for each of 70 x 64 heads; int8: 70 MiB, and one for
    # each of 70 x 64 x 128 rows.
    [
        ("fp32", 280.0, 1, 280.0),
        ("fp16", 140 + 70 * 64 * 4 / MIB, 2, 280.0),
        ("int8", 72.1875, 4, 288.75),
        ("auto", AUTO, 7, 560.0),
    ],
)
def test_the_released_model(dtype, snapshot_mib, snapshots, slab_mib) -> None:
    plan = plan_memory(
        preset("minimax-text-01"),
        budget_bytes=150 * GIB,
        context_tokens=1_000_000,
        snapshot_dtype=dtype,
    )
    assert plan.state_bytes == 280 * MIB
    assert plan.page_bytes == 64 * 40_960
    assert plan.snapshot_bytes / MIB == snapshot_mib
    assert plan.layout.places[Tenant.SNAPSHOT] == snapshots
    assert 0 <= plan.layout.slab_bytes / MIB - slab_mib < 1
    assert plan.smallest_cacheable_prefix_tokens == 64


def test_a_budget_that_is_too_small_is_refused_with_the_arithmetic() -> None:
    message = (
        "budget_bytes must hold one request of 1,000,000 tokens: a sink of 293,601,280 + a state "
        "of 293,601,280 + 15,625 pages of 2,621,440 bytes in 142 slabs of 293,601,280 = "
        "41,691,381,760 bytes, got 41,691,381,759, which is 141 slabs"
    )

    def plan(budget: int) -> MemoryPlan:
        config = preset("minimax-text-01")
        return plan_memory(config, budget_bytes=budget, context_tokens=1_000_000)

    with pytest.raises(ConfigError) as error:
        plan(41_691_381_759)
    assert str(error.value) == message
    longest = plan(41_691_381_760).longest_context_tokens
    assert longest is not None
    assert longest >= 1_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_tokens": 8}, "page_tokens must be a multiple of 16 from 16 to 64, got 8"),
        ({"page_tokens": 128}, "page_tokens must be a multiple of 16 from 16 to 64, got 128"),
        ({"context_tokens": 0}, "context_tokens must be 1 or more, got 0"),
        ({"budget_bytes": 0}, "budget_bytes must hold one request of 100 tokens: .* got 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_memory(preset("nano"), **{"budget_bytes": GIB, "context_tokens": 100} | options)


def test_the_report_says_what_the_plan_gives() -> None:
    plan = plan_memory(preset("bench-2b"), budget_bytes=100 * GIB, context_tokens=1_048_576)
    assert plan_report(plan).splitlines() == [
        "memory              100.0 GiB: 7,314 slabs of 14.0 MiB, one of them the sink",
        "state               14.0 MiB a request, fp32; 1 a slab",
        "page                256.0 KiB for 64 tokens; 56 a slab",
        "snapshot            14.0 MiB fp32; 1 a slab",
        "longest context     26,206,208 tokens",
        "at 8,192 tokens     2,225 requests at a time",
        "at 131,072 tokens   194 requests at a time",
        "at 1,048,576 tokens 24 requests at a time",
        "cacheable prefix    from 64 tokens",
    ]
    values = plan_values(plan)
    assert values["pages_per_slab"] == 56
    assert values["concurrency"] == {8_192: 2_225, 131_072: 194, 1_048_576: 24}
    linear = plan_memory(preset("nano-lightning"), budget_bytes=MIB, context_tokens=1)
    assert "page                none" in plan_report(linear)
    assert "longest context     any" in plan_report(linear)


@pytest.mark.parametrize(
    ("most", "contexts"),
    [
        (1000, ["1,000"]),
        (8192, ["8,192"]),
        (65_536, ["8,192", "65,536"]),
        (2_000_000, ["8,192", "131,072", "1,048,576", "2,000,000"]),
    ],
)
def test_the_report_keeps_to_the_engine_s_limits(most: int, contexts: list[str]) -> None:
    plan = plan_memory(preset("nano"), budget_bytes=4 << 30, context_tokens=1)
    assert plan.longest_context_tokens > most
    limits = SchedulerConfig(max_request_tokens=most, page_tokens=64)
    lines = plan_report(plan, limits).splitlines()
    assert f"longest context     {most:,} tokens" in lines
    rows = [line for line in lines if line.startswith("at ")]
    assert [row.split()[1] for row in rows] == contexts
    assert lines[-1] == "cacheable prefix    from 64 tokens"
    invariant = limits.model_copy(update={"batch_invariant": True, "min_chunk_tokens": 128})
    assert plan_report(plan, invariant).endswith("cacheable prefix    from 128 tokens")
