"""Engines with fewer bits: near fp32, repeatable, and the same in any company."""

import pytest
import torch
from device_helpers import FakeCapture
from engine_helpers import tiny_model, uncached
from test_engine import prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine import SamplingParams
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.engine import Engine
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.request import Request
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel

PAGE_TOKENS = 16


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return tiny_model("lllf", max_position_embeddings=200)


def plan_of(model: HybridModel, **dtypes):
    size = {"budget_bytes": 1 << 20, "context_tokens": 160, "page_tokens": PAGE_TOKENS}
    return plan_memory(model.config, **size, kv_element_bytes=4, **dtypes)


def build(model: HybridModel, tokenizer: Tokenizer, **dtypes) -> Engine:
    config = SchedulerConfig(
        max_request_tokens=160, page_tokens=PAGE_TOKENS, min_chunk_tokens=16, max_step_tokens=400
    )
    return Engine(model, tokenizer, plan_of(model, **dtypes), config)


def logits_of(model: HybridModel, ids: list[int], **dtypes) -> torch.Tensor:
    """Logits after each of the last tokens, decoded one by one behind a prefill of half."""
    plan = plan_of(model, **dtypes)
    storage = Storage(model.config, plan, device=model.device, dtype=model.dtype)
    runner = Runner(model, storage, page_tokens=PAGE_TOKENS)
    pages = list(range(plan.layout.places[1] * 2, plan.layout.places[1] * 2 + 12))
    state, half, found = plan.layout.places[0], len(ids) // 2, []
    for first, end in [(0, half), *((n, n + 1) for n in range(half, len(ids)))]:
        row = Row(ids[first:end], first, state, pages, {}, seed=3)
        found.append(runner.run([row])[0])
    return torch.stack(found)


@pytest.mark.parametrize(("dtype", "unit"), [("fp16", 2.0**-10), ("int8", 1 / 127)])
def test_logits_lie_near_those_of_fp32(model: HybridModel, dtype: str, unit: float) -> None:
    (ids,) = prompts(3, [90])
    exact, got = logits_of(model, ids), logits_of(model, ids, state_dtype=dtype)
    error = ((got - exact).norm(dim=-1) / exact.norm(dim=-1))[1:]
    # The median: norms of a model of 16 channels blow up what reaches a few of the tokens.
    assert error.min() > 0
    assert error.median() < 10 * unit
    assert torch.equal(got, logits_of(model, ids, state_dtype=dtype)), "a run is repeatable"


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_crowd_gets_what_each_gets_alone(
    model: HybridModel, tokenizer: Tokenizer, dtype: str
) -> None:
    texts = prompts(0, [1, 30, 3, 17])
    alone = []
    for n, prompt in enumerate(texts):
        engine = build(model, tokenizer, state_dtype=dtype)
        submit(engine, "one", prompt, 20, temperature=1.0, seed=n + 2**63)
        alone.append(tokens(run(engine)["one"]))
    engine = build(model, tokenizer, state_dtype=dtype)
    for n, prompt in enumerate(texts):
        submit(engine, str(n), prompt, 20, temperature=1.0, seed=n + 2**63)
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(len(texts))] == alone


@pytest.mark.parametrize("state_dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("snapshot_dtype", ["fp16", "int8", "auto"])
def test_a_turn_goes_on_from_a_rounded_snapshot(
    model: HybridModel, tokenizer: Tokenizer, state_dtype: str, snapshot_dtype: str
) -> None:
    (first,) = prompts(2, [85])
    engine = build(model, tokenizer, state_dtype=state_dtype, snapshot_dtype=snapshot_dtype)
    submit(engine, "first", first, 8, marks=(80,))
    answer = tokens(run(engine)["first"])
    assert answer[0] == uncached(model, first, 1)[0], "before any snapshot or decoding"
    second = [*first, *answer, 7, 8, 9]
    submitted = submit(engine, "second", second, 4, logprobs=5)
    events = run(engine)["second"]
    assert submitted.num_cached_tokens >= 80
    exact = torch.log_softmax(model(torch.tensor([second]))[0, -1].double(), -1)
    chosen = events[0].logprobs
    assert chosen is not None
    # Within what int8 through three layers of a model of 16 channels moves a log probability.
    assert abs(chosen.chosen - float(exact[events[0].token_id])) < 0.5


def test_states_of_a_ring_are_zeroed_for_the_next(model: HybridModel, tokenizer: Tokenizer) -> None:
    """Memory that a request full of NaN has left gives the next one what it gets alone."""
    poisoned = HybridModel(model.config)
    poisoned.load_state_dict(model.state_dict())
    with torch.no_grad():
        poisoned.embed_tokens.weight[299] = float("nan")
    poisoned = poisoned.eval().requires_grad_(False)
    good = [5, 6, 7, 8]
    for dtype in ("fp16", "int8"):
        engine = build(model, tokenizer, state_dtype=dtype, snapshot_dtype="int8")
        submit(engine, "good", good, 20)
        wanted = tokens(run(engine)["good"])
        engine = build(poisoned, tokenizer, state_dtype=dtype, snapshot_dtype="int8")
        for n in range(3):
            engine.submit(Request(f"bad{n}", (5, 299, *range(40)), 6), SamplingParams(max_tokens=6))
            assert run(engine)[f"bad{n}"][-1].finish_reason == "error"
            submit(engine, str(n), good, 20)
            assert tokens(run(engine)[str(n)]) == wanted


def on_device(monkeypatch: pytest.MonkeyPatch, capture: FakeCapture) -> None:
    """Engines take the runner for a GPU."""
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: DeviceRunner(
            model, storage, page_tokens=PAGE_TOKENS, batch_sizes=(1, 2, 4, 6), capture=capture
        ),
    )


@pytest.mark.parametrize(
    "dtypes",
    [
        {"state_dtype": "fp16"},
        {"state_dtype": "int8", "snapshot_dtype": "int8"},
        {"snapshot_dtype": "auto"},
    ],
    ids=["fp16", "int8", "snapshots"],
)
def test_recorded_steps_give_the_same_tokens(
    model: HybridModel, tokenizer: Tokenizer, dtypes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, found, capture = prompts(0, [1, 30, 3, 17, 70]), [], FakeCapture()
    for kind in ("plain", "device"):
        if kind == "device":
            on_device(monkeypatch, capture)
        engine = build(model, tokenizer, **dtypes)
        engine.warm_up()
        for n, text in enumerate(texts):
            submit(engine, str(n), text, 20, temperature=1.0, seed=n + 2**63)
        events = run(engine)
        turn = {}
        for n, text in enumerate(texts):
            second = [*text, *tokens(events[str(n)]), 5]
            submit(engine, f"{n} again", second, 6)
            turn |= run(engine)
        found.append({name: tokens(one) for name, one in (events | turn).items()})
    assert found[0] == found[1]
    assert capture.recorded == 4
    assert engine._worker.ahead is None
    assert engine.counters().hit_tokens > 0


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_padding_and_what_buffers_held_change_no_bit(model: HybridModel, dtype: str) -> None:
    plan = plan_of(model, state_dtype=dtype)
    places, found = plan.layout.places, []
    for crowded in (False, True):
        storage = Storage(model.config, plan, device=model.device, dtype=model.dtype)
        runner = DeviceRunner(
            model, storage, page_tokens=PAGE_TOKENS, batch_sizes=(4,), capture=FakeCapture()
        )
        pages = [[(5 + n) * places[1]] for n in range(3)]
        rows = [
            Row(prompts(n, [9])[0], 0, (n + 1) * places[0], pages[n], {}, seed=n + 7)
            for n in range(3)
        ]
        runner.run(rows)
        steps = [Row([5 + n], 9, rows[n].state, pages[n], {}, seed=n + 7) for n in range(3)]
        if crowded:  # another request passes through the same buffers
            runner.run(steps[1:])
        found.append(runner.run(steps[:1]).clone())
    assert torch.equal(*found)
