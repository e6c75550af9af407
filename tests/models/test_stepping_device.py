"""A few rows by kernels equal the same rows layer by layer, on a GPU or under the interpreter."""

import pytest
import torch
from kernel_device import DEVICE, GPU_UNLESS_INTERPRETED, INTERPRETED, LOW_DTYPES
from model_cases import MOE, tiny_model, tokens

from sevenfold.models import (
    Batch,
    HybridModel,
    MoEConfig,
    PagedKV,
    PageTable,
    PooledState,
    empty_state,
    hybrid,
    stepping,
    stepping_device,
)
from sevenfold.ops import Snapshots
from sevenfold.ops.testing import check_error

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    pytest.mark.filterwarnings("ignore:.*has no tuning"),
]
# Widths of whole 16 bytes, of which no tile is a multiple.
WIDTHS = {"hidden_size": 24, "head_dim": 16, "intermediate_size": 40, "rotary_dim": 8}
SHARED = MoEConfig(num_local_experts=3, num_experts_per_tok=2, shared_intermediate_size=8)
MIXES = [
    {"layers": "ls", "moe": MOE},
    {"layers": "lf", "norm_placement": "pre_norm"},
    {"layers": "lf", "moe": SHARED, "linear_attn_norm_groups": 2},
]
DTYPE = torch.float32  # a router's choice may turn on the last bit of fewer


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the interpreter's CPU take a GPU's way; the kernels' halves that ran, by name."""
    ran = []
    if INTERPRETED:
        monkeypatch.setattr(stepping, "suits_device_rows", lambda x: x.dtype is not torch.float64)
        monkeypatch.setattr(stepping, "_mix", stepping_device.device_mix)
        monkeypatch.setattr(stepping, "_feed", stepping_device.device_feed)
    for name in ("feed_lightning", "feed_softmax", "dense_on_device", "experts_on_device"):
        run = getattr(stepping_device, name)

        def recorded(*args, name=name, run=run):
            ran.append(name)
            return run(*args)

        monkeypatch.setattr(stepping_device, name, recorded)
    return ran


def model_of(mix: dict, dtype: torch.dtype) -> HybridModel:
    return tiny_model(dtype=dtype, **(WIDTHS | mix)).to(DEVICE)


def run(mix: dict, dtype: torch.dtype, N: int, tokens_each: int) -> list[torch.Tensor]:
    """Logits and linear states after a prompt of two tokens, and some tokens more."""
    model = model_of(mix, dtype)
    with torch.no_grad():
        state = empty_state(model.config, N, 12, device=DEVICE, dtype=dtype)
        prompt = Batch.rows(N, 2, device=DEVICE)
        state = model.hidden(tokens(N, 2).to(DEVICE), prompt, state).state
        batch = Batch.rows(N, tokens_each, past=(2,) * N, device=DEVICE)
        found = model.hidden(tokens(N, tokens_each, seed=1).to(DEVICE), batch, state)
        logits = model.logits(found.hidden)
    return [logits, *(s.kv for s in found.state or () if hasattr(s, "kv"))]


@pytest.mark.parametrize(
    ("mix", "N", "tokens_each"),
    [(MIXES[0], 3, 1), (MIXES[1], 2, 9), (MIXES[2], 3, 1)],
    ids=["moe", "pre", "shared"],
)
def test_rows_equal_layers(
    mix: dict, N: int, tokens_each: int, by_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(mix, DTYPE, N, tokens_each)
    layers = mix["layers"]
    softmax = ["feed_softmax"] * 2 * (len(layers) - layers.count("l"))
    lightning = ["feed_lightning"] * 2 * layers.count("l")
    feed = "experts_on_device" if "moe" in mix else "dense_on_device"
    if mix.get("moe") is SHARED:
        assert sorted(by_kernels) == softmax
    else:
        assert sorted(by_kernels) == sorted([*softmax, *lightning, *[feed] * 2 * len(layers)])
    monkeypatch.setattr(hybrid, "pays_by_rows", lambda x, batch: False)
    honest, exact = (run(mix, dtype, N, tokens_each) for dtype in (DTYPE, torch.float64))
    for i, three in enumerate(zip(found, honest, exact, strict=True)):
        check_error(f"output {i}", *three)


def pooled(model: HybridModel, N: int) -> tuple:
    """Random states in a pool, and pages of one token each, where a device's runner keeps them."""
    config, state = model.config, []
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    H, D, G = config.num_attention_heads, config.head_dim, config.num_key_value_heads
    slots = torch.arange(N, 0, -1, device=DEVICE)
    page = torch.arange(N, device=DEVICE)
    table = PageTable(page[:, None], page, page * 0 + 1, page * 0 + 2)
    wide = torch.promote_types(model.dtype, torch.float32)
    for layer in config.layer_types:
        if layer == "linear_attention":
            pool = random(N + 2, H, D, D, dtype=wide)
            state.append(PooledState(pool, slots, Snapshots(torch.zeros_like(pool[:1]), ())))
        else:
            k, v = (random(N, 16, G, D, dtype=model.dtype) for _ in range(2))
            state.append(PagedKV(k, v, table))
    return tuple(state)


def step(dtype: torch.dtype, N: int) -> list[torch.Tensor]:
    """One decoding step in place: logits, pools and pages after it."""
    model = model_of({"layers": "lf", "moe": MOE}, dtype)
    state = pooled(model, N)
    positions = torch.ones(N, 1, dtype=torch.int64, device=DEVICE)
    batch = Batch((1,) * N, (1,) * N, positions, None)
    with torch.inference_mode():
        logits = model.logits(model.hidden(tokens(N, 1).to(DEVICE), batch, state).hidden)
    linear, full = state
    return [logits, linear.pool, full.k, full.v]


@pytest.mark.parametrize("N", [5] if INTERPRETED else [1, 5])
def test_a_step_in_place_equals_layers(
    N: int, by_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = step(DTYPE, N)
    assert len(by_kernels) == 4
    monkeypatch.setattr(hybrid, "pays_by_rows", lambda x, batch: False)
    for i, three in enumerate(zip(found, step(DTYPE, N), step(torch.float64, N), strict=True)):
        check_error(f"output {i}", *three)


@pytest.mark.skipif(INTERPRETED, reason="captures a graph")
@pytest.mark.parametrize("N", [1, 8, 64, 128])
def test_a_step_is_captured_in_a_graph(N: int) -> None:
    """A replay gives the bits of the step run as it comes."""
    model = model_of(
        {"layers": "llf", "moe": MOE, "hidden_size": 256, "head_dim": 64}, LOW_DTYPES[0]
    )
    state = pooled(model, N)
    batch = Batch((1,) * N, (1,) * N, torch.ones(N, 1, dtype=torch.int64, device=DEVICE), None)
    ids = tokens(N, 1).to(DEVICE)
    pools = [s.pool for s in state if isinstance(s, PooledState)]
    before = [pool.clone() for pool in pools]

    def run() -> torch.Tensor:
        for pool, old in zip(pools, before, strict=True):
            pool.copy_(old)
        return model.logits(model.hidden(ids, batch, state).hidden)

    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        ids.copy_(tokens(N, 1, seed=5))
        graph.replay()
        assert torch.equal(found, run())


@pytest.mark.parametrize("layers", ["lf", "sl"])
def test_of_a_few_rows_the_last_layer_serves_ends_alone(
    layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = []
    run_experts = stepping_device.experts_on_device

    def noted(x, *others):
        fed.append(len(x))
        return run_experts(x, *others)

    monkeypatch.setattr(stepping_device, "experts_on_device", noted)
    mix, lengths = {"layers": layers, "moe": MOE}, [5, 1, 3]
    batch, ends = Batch.packed(lengths, device=DEVICE), torch.tensor([4, 5, 8], device=DEVICE)
    ids = tokens(1, sum(lengths)).to(DEVICE)

    def run(dtype: torch.dtype, *, alone: bool) -> list[torch.Tensor]:
        model = model_of(mix, dtype)
        state = empty_state(model.config, 3, 12, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            if alone:
                found = model.hidden_at_ends(ids, batch, state, ends)
                hidden = found.hidden[:, 0]
            else:
                found = model.hidden(ids, batch, state)
                hidden = found.hidden[0, ends]
        return [hidden, *(x for value in found.state or () for x in vars(value).values())]

    found = run(DTYPE, alone=True)
    assert fed == [sum(lengths), len(lengths)]
    honest, exact = run(DTYPE, alone=False), run(torch.float64, alone=False)
    for n, case in enumerate(zip(found, honest, exact, strict=True)):
        check_error(f"{layers} {n}", *case)
