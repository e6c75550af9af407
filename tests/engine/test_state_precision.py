"""Which bits a head's state gets, what they cost, and what is refused."""

import math

import pytest
import torch
from engine_helpers import tiny_model

from sevenfold.config import ConfigError
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.memory_report import plan_report, plan_values
from sevenfold.engine.precision import snapshot_formats
from sevenfold.engine.storage import Storage
from sevenfold.models import preset
from sevenfold.ops import layer_log_decay

MIB = 1 << 20
TEXT_01 = preset("minimax-text-01")
ROUNDING = {"int8": 1 / 254, "fp16": 2**-11}


def test_auto_keeps_more_bits_of_heads_that_remember_longer() -> None:
    formats = snapshot_formats(TEXT_01, "auto")
    layers = [n for n, kind in enumerate(TEXT_01.layer_types) if kind == "linear_attention"]
    order = ("int8", "fp16", "fp32")
    seen = set()
    for layer, heads in zip(layers, formats, strict=True):
        decay = layer_log_decay(64, layer, 80).double().exp()
        # Heads come fastest first.
        assert [order.index(name) for name in heads] == sorted(order.index(name) for name in heads)
        for head, name in enumerate(heads):
            left = float(decay[head]) ** 512  # of an error, when the next snapshot is taken
            allowed = [one for one in ROUNDING if ROUNDING[one] / (1 - left) <= 2**-7]
            assert name == (allowed[0] if allowed else "fp32")
            seen.add(name)
    assert seen == set(order)
    assert snapshot_formats(TEXT_01, "fp16") == (("fp16",) * 64,) * 70
    assert snapshot_formats(preset("nano-softmax"), "auto") == ()


@pytest.mark.parametrize(
    ("state_dtype", "element_bytes", "num_bytes"),
    [
        ("fp32", 2, 70 * 64 * 4 * 128**2),
        ("fp16", 2, 70 * 64 * (2 * 128**2 + 4)),
        # A scale for each row, and 16 keys and values with their count.
        ("int8", 2, 70 * 64 * (128**2 + 4 * 128 + 2 * 16 * 128 * 2 + 4)),
        ("int8", 4, 70 * 64 * (128**2 + 4 * 128 + 2 * 16 * 128 * 4 + 4)),
    ],
)
def test_bytes_of_an_active_state(state_dtype, element_bytes, num_bytes) -> None:
    plan = plan_memory(
        TEXT_01,
        budget_bytes=10 << 30,
        context_tokens=1000,
        state_dtype=state_dtype,
        kv_element_bytes=element_bytes,
    )
    assert plan.state_bytes == num_bytes
    values = plan_values(plan)
    assert (values["state_dtype"], values["state_bytes"]) == (state_dtype, num_bytes)


def test_the_report_names_the_precisions() -> None:
    plan = plan_memory(
        TEXT_01,
        budget_bytes=150 << 30,
        context_tokens=1_000_000,
        state_dtype="int8",
        snapshot_dtype="auto",
    )
    assert plan_report(plan).splitlines()[1:4] == [
        "state               107.2 MiB a request, int8 and a ring of 16 tokens; 3 a slab",
        "page                2.5 MiB for 64 tokens; 128 a slab",
        "snapshot            76.8 MiB auto: 264 heads fp16, 14 heads fp32, 4,202 heads int8; "
        "4 a slab",
    ]
    assert plan_values(plan)["snapshot_heads"] == {"int8": 4202, "fp16": 264, "fp32": 14}


def test_bf16_is_refused_where_it_would_erase_a_horizon() -> None:
    message = (
        r"state_dtype must not be bf16 where a head's decay lies within 2\^-8 of 1, which rounding "
        r"to nearest erases: got 822 such heads, the slowest of them head 63 of layer 78 with "
        r"decay 0.99995052 a token \(horizon 20,208 tokens\); use fp32, fp16 \(stochastic "
        r"rounding\) or int8 \(replay ring\)"
    )
    with pytest.raises(ConfigError, match=message):
        plan_memory(TEXT_01, budget_bytes=10 << 30, context_tokens=1, state_dtype="bf16")
    # Two heads of slopes 1/16 and 1/256: in one layer, 1 - exp(-1/256) lies just below 2^-8.
    with pytest.raises(ConfigError, match="got 1 such heads, the slowest of them head 1 of layer"):
        plan_memory(tiny_model("l").config, budget_bytes=MIB, context_tokens=1, state_dtype="bf16")


@pytest.mark.parametrize(("horizon", "erased"), [(200, 0), (254, 0), (257, 1), (512, 128)])
def test_what_the_rule_refuses_is_what_rounding_erases(horizon: int, erased: int) -> None:
    """What a token adds to a state that it keeps level, 1 - decay of it, in each of one binade."""
    states = torch.arange(128, 256).bfloat16()
    added = (states.float() * (2 - math.exp(-1 / horizon))).bfloat16()
    assert int((added == states).sum()) == erased


@pytest.mark.parametrize(
    ("state_dtype", "snapshot_dtype", "dtype"),
    [
        ("fp32", "fp32", torch.float32),
        ("fp32", "auto", torch.bfloat16),
        ("fp16", "auto", torch.float32),
        ("fp16", "fp16", torch.bfloat16),
        ("int8", "fp32", torch.float32),
        ("int8", "int8", torch.bfloat16),
    ],
)
def test_what_is_written_is_read_and_touches_nothing_else(
    state_dtype, snapshot_dtype, dtype
) -> None:
    """Every byte of every item lies where the plan says: random items, then all read again."""
    # One head of a horizon below 730 tokens and one above: auto has two formats in some layers.
    config = tiny_model("lfl" + 9 * "l").config
    plan = plan_memory(
        config,
        budget_bytes=MIB,
        context_tokens=1,
        page_tokens=16,
        state_dtype=state_dtype,
        snapshot_dtype=snapshot_dtype,
        kv_element_bytes=dtype.itemsize,
    )
    storage = Storage(config, plan, device=torch.device("cpu"), dtype=dtype)
    linear = [layer for layer in storage.layers if hasattr(layer, "snapshots")]
    generator = torch.Generator().manual_seed(0)
    places = plan.layout.places
    # The second slab holds states, the third snapshots.
    slots = torch.arange(places[Tenant.STATE], 2 * places[Tenant.STATE])
    kept = torch.arange(2 * places[Tenant.SNAPSHOT], 3 * places[Tenant.SNAPSHOT])
    written = []
    for layer in linear:
        states = torch.randn(len(slots), 2, 8, 8, generator=generator)
        layer.write_states(slots, states)
        again = torch.randn(len(kept), 2, 8, 8, generator=generator)
        layer.snapshots.write(kept, again)
        written.append((states, again))
    for layer, (states, again) in zip(linear, written, strict=True):
        for precision, found, wanted in (
            (state_dtype, layer.read_states(slots), states),
            (snapshot_dtype, layer.snapshots.read(kept), again),
        ):
            largest = wanted.abs().amax((-2, -1), keepdim=True)
            bound = {"fp32": 0.0, "fp16": 2**-11}.get(precision, 1 / 250)
            assert ((found - wanted).abs() <= bound * largest).all()


@pytest.mark.parametrize("snapshot_dtype", ["fp32", "fp16", "int8", "auto"])
def test_a_snapshot_of_a_restored_snapshot_is_the_same(snapshot_dtype) -> None:
    """Quantised once: what goes on from a snapshot, and is kept at its place, has its bits."""
    config = tiny_model("lfl" + 9 * "l").config
    size = {"budget_bytes": MIB, "context_tokens": 1, "kv_element_bytes": 4}
    plan = plan_memory(config, **size, snapshot_dtype=snapshot_dtype)
    storage = Storage(config, plan, device=torch.device("cpu"), dtype=torch.float32)
    linear = [layer for layer in storage.layers if hasattr(layer, "snapshots")]
    generator = torch.Generator().manual_seed(1)
    state, last = plan.layout.places[Tenant.STATE], 2 * plan.layout.places[Tenant.SNAPSHOT]
    for layer in linear:
        layer.write_states(torch.tensor([state]), torch.randn(1, 2, 8, 8, generator=generator))
    storage.snapshot([state], [last])
    first = [layer.snapshots.read(torch.tensor([last])) for layer in linear]
    stride = plan.layout.stride_bytes(Tenant.SNAPSHOT)
    raw = storage._arena.view(-1, stride)[last].clone()
    for _ in range(3):
        storage.restore([last], [state])
        storage.snapshot([state], [last])
    assert torch.equal(storage._arena.view(-1, stride)[last], raw)
    for layer, wanted in zip(linear, first, strict=True):
        assert torch.equal(layer.read_states(torch.tensor([state])), wanted)
