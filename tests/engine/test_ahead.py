"""Steps begun ahead of their plans: the same events, and nothing left of what came too much."""

import random
from collections.abc import Callable

import pytest
import torch
from device_helpers import FakeCapture, new_runner
from engine_helpers import shared_model, tiny_model, uncached
from test_engine import MIXES, build, prompts, run, submit, tiny_model_with_nan, tokens
from tokenizers import Tokenizer

from sevenfold.engine import worker as worker_module
from sevenfold.engine.ahead import Ahead
from sevenfold.engine.device.staging import Staging
from sevenfold.engine.engine import Engine
from sevenfold.engine.events import TokenEvent
from sevenfold.engine.transfer import Arriving
from sevenfold.models import HybridModel

Build = Callable[..., Engine]
GRAPHS = ["graphs", "no graphs"]
LIMITS = {
    "whole prompts": {"headroom_tokens": 0, "max_running": 6},
    "chunks": {"max_running": 6, "max_prefills": 2, "max_step_tokens": 40},
}


# Every two of a mix, of limits and of graphs or none.
CROWDS = [
    (mix, limits, graphs)
    for n, mix in enumerate(MIXES)
    for limits, graphs in zip(LIMITS, GRAPHS if n % 2 else reversed(GRAPHS), strict=True)
]


@pytest.fixture(params=GRAPHS)
def build_device(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Build:
    """Builds engines over the runner for a GPU."""
    capture = FakeCapture() if request.param == "graphs" else None
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, capture, (1, 2, 4)),
    )

    def built(model: HybridModel, *, ahead: bool = True, **limits: float) -> Engine:
        engine = build(model, tokenizer, **limits)
        if not ahead:
            engine._worker.ahead = None
        return engine

    return built


@pytest.fixture
def num_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step that was begun ahead: its rows that are somebody's."""
    found: list[int] = []
    launch = Ahead.launch

    def watched(self: Ahead, *args):
        begun = launch(self, *args)
        if begun is not None:
            found.append(sum(request is not None for request in begun.requests))
        return begun

    monkeypatch.setattr(Ahead, "launch", watched)
    return found


def drive(engine: Engine, seed: int) -> list[list[TokenEvent]]:
    """The events of each step of a random crowd: who comes and goes when depends on the seed."""
    draw, steps, name = random.Random(seed), [], 0
    idle = engine.cache.usage()
    # Who waits rises in rank, and where loops are compiled a step takes seconds.
    engine.scheduler._clock = lambda: 0.01 * len(steps)
    for _ in range(400):
        if name < 15 and draw.random() < 0.12:
            lengths = [draw.randrange(1, 50) for _ in range(3)]
            for text in prompts(draw.random(), lengths, shared=20):
                submit(engine, str(name), text, draw.randrange(1, 50), **options(draw))
                name += 1
        if draw.random() < 0.06 and name:
            engine.cancel(str(max(0, name - draw.randrange(1, 4))))
        if engine.has_work:
            steps.append(engine.step())
        elif name == 15:
            break
    else:
        raise AssertionError("the crowd must come to its end")
    engine.cache.clear()
    assert engine.cache.usage() == idle
    assert engine._ahead.chosen is None
    return steps


def options(draw: random.Random) -> dict:
    """What a request asks: most choose blindly, some must not."""
    kind = draw.randrange(12)
    found = {"stop_token_ids": tuple(draw.sample(range(300), 6))}
    if kind == 0:
        return found | {"min_tokens": 1, "logprobs": 1}
    if kind == 1:
        return found | {"stop": ("th", "e", "a")}
    if kind in (2, 3):
        sampled = {"temperature": 1.2, "seed": draw.randrange(99), "top_k": 40}
        return found | sampled | {"presence_penalty": 0.9}
    return found | {"priority": draw.randrange(3)}


@pytest.mark.parametrize(("mix", "limits", "build_device"), CROWDS, indirect=["build_device"])
def test_every_step_gives_the_same_events(
    mix: str, limits: str, build_device: Build, num_ahead: list[int]
) -> None:
    model, reasons = shared_model(mix), set()
    for seed in range(2):
        had = len(num_ahead)
        plain = drive(build_device(model, ahead=False, **LIMITS[limits]), seed)
        assert len(num_ahead) == had
        assert drive(build_device(model, **LIMITS[limits]), seed) == plain
        reasons |= {event.finish_reason for step in plain for event in step}
    assert len(num_ahead) > 40
    assert max(num_ahead) > 2
    assert reasons >= {None, "stop", "length", "cancelled"}


@pytest.mark.parametrize("mix", MIXES)
def test_requests_that_lose_their_memory_while_a_step_is_under_way(
    mix: str, build_device: Build, num_ahead: list[int]
) -> None:
    model = shared_model(mix)
    texts = prompts(1, [50, 60, 41, 20], shared=30)
    wanted = [uncached(model, text, 30) for text in texts]
    engine = build_device(model, slabs=24, headroom_tokens=0, max_running=2)
    idle = engine.cache.usage()
    lost = 0
    events: dict[str, list[TokenEvent]] = {}
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 30, priority=n)  # pushes one before it out
        for _ in range(8):
            under_way, before = engine._ahead.chosen, engine.scheduler.num_preemptions
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
            lost += under_way is not None and engine.scheduler.num_preemptions > before
    for name, more in run(engine).items():
        events.setdefault(name, []).extend(more)
    assert [tokens(events[str(n)]) for n in range(4)] == wanted
    assert num_ahead
    assert lost
    engine.cache.clear()
    assert engine.cache.usage() == idle


def test_a_snapshot_in_the_surplus_is_nobodys_state(build_device: Build) -> None:
    """An output that ends on a border: what its turn is gone on from has not seen the surplus."""
    model = shared_model("lf")
    (text,) = prompts(2, [40])
    usual = uncached(model, text, 40)
    for end in range(20, 28):  # 64 tokens are seen after 24 of the output
        engine = build_device(model)
        submit(engine, "first", text, 40, stop_token_ids=(usual[end],), min_tokens=0)
        first = tokens(run(engine)["first"])
        assert first == usual[: usual.index(usual[end]) + 1]
        second = [*text, *first, 9]
        again = submit(engine, "second", second, 6)
        assert tokens(run(engine)["second"]) == uncached(model, second, 6)
        assert again.num_cached_tokens == (64 if len(first) > 24 else 32)


def test_one_that_fails_leaves_the_others_alone(build_device: Build, num_ahead: list[int]) -> None:
    model = tiny_model_with_nan(shared_model("lsf"), token=299)
    texts = prompts(3, [5, 9])
    texts = [[token % 299 for token in text] for text in texts]
    engine = build_device(model, slabs=30)
    submit(engine, "bad", texts[0], 12, logit_bias={299: 100.0})
    submit(engine, "good", texts[1], 12)
    events = run(engine)
    assert [event.finish_reason for event in events["bad"]] == [None, "error"]
    assert tokens(events["good"]) == uncached(model, texts[1], 12)
    assert num_ahead
    for n in range(4):
        submit(engine, str(n), texts[1], 12)
        assert tokens(run(engine)[str(n)]) == uncached(model, texts[1], 12)


def test_a_step_that_breaks_off_is_forgotten(
    build_device: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("lsf")
    texts = prompts(4, [12, 30])
    engine = build_device(model)
    submit(engine, "one", texts[0], 20)
    for _ in range(4):
        engine.step()
    assert engine._ahead.chosen is not None
    with monkeypatch.context() as broken:
        broken.setattr(Arriving, "numbers", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.abandon("interrupted")
    submit(engine, "one ", texts[1], 20)
    events = run(engine)
    assert events["one"][-1].finish_reason == "error"
    assert tokens(events["one "]) == uncached(model, texts[1], 20)


def test_the_next_step_is_launched_before_the_last_one_is_read(
    build_device: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("lsf")
    engine, order = build_device(model), []
    run_ahead, numbers = engine._worker.ahead.run_ahead, Arriving.numbers
    monkeypatch.setattr(
        engine._worker.ahead,
        "run_ahead",
        lambda *args: order.append("launch") or run_ahead(*args),
    )
    monkeypatch.setattr(Arriving, "numbers", lambda one: order.append("read") or numbers(one))
    submit(engine, "one", prompts(5, [12])[0], 6)
    run(engine)
    # The prompt's token and five more; behind the last there is none.
    assert order == [*["launch", "read"] * 5, "read"]


@pytest.mark.parametrize(
    "asked",
    [{"logprobs": 0}, {"bad_words": ("heron",)}, {"min_tokens": 9}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_the_host_looks_after_keeps_steps_in_turn(
    asked: dict, build_device: Build, num_ahead: list[int]
) -> None:
    model = shared_model("lsf")
    engine = build_device(model)
    submit(engine, "asks", prompts(6, [8])[0], 9, **asked)
    submit(engine, "plain", prompts(7, [8])[0], 20)
    events = run(engine)
    assert len(events["asks"]) == 9
    # Once it has ended, the other one goes ahead.
    assert num_ahead == [1] * 10


def test_a_row_of_nobody_stays_until_a_smaller_step_will_do(
    build_device: Build, num_ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("lsf")
    engine, sizes = build_device(model), []
    runner = engine._worker.ahead
    run_ahead = runner.run_ahead
    monkeypatch.setattr(
        runner, "run_ahead", lambda rows, ids: sizes.append(len(rows)) or run_ahead(rows, ids)
    )
    texts = prompts(8, [5, 6, 7, 8])
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 6 + 3 * n)
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(4)] == [
        uncached(model, text, 6 + 3 * n) for n, text in enumerate(texts)
    ]
    # Every token but the prompts' own comes from a step begun ahead.
    assert num_ahead == [4] * 5 + [3] * 3 + [2] * 3 + [1] * 3
    three = 3 if runner.capture is None else 4
    assert sizes == [4] * 5 + [three] * 3 + [2] * 3 + [1] * 3


def test_who_joins_stands_in_the_order_of_rank(build_device: Build, num_ahead: list[int]) -> None:
    model = shared_model("lsf")
    engine = build_device(model)
    submit(engine, "first", prompts(1, [9])[0], 30, temperature=1.1, seed=1, presence_penalty=0.7)
    for _ in range(4):
        engine.step()
    submit(engine, "urgent", prompts(2, [20])[0], 9, priority=5)
    engine.step()
    assert [request.id for request in engine._ahead.chosen.requests] == ["urgent", "first"]
    found = tokens(run(engine)["first"])
    alone = build_device(model, ahead=False)
    submit(alone, "first", prompts(1, [9])[0], 30, temperature=1.1, seed=1, presence_penalty=0.7)
    assert tokens(run(alone)["first"])[5:] == found
    assert num_ahead == [1] * 4 + [2] * 8 + [1] * 17


def test_reading_numbers_does_not_see_what_comes_later() -> None:
    numbers = torch.tensor([[1, 0], [2, 1]])
    arriving = Arriving(numbers)
    numbers.zero_()
    assert arriving.numbers() == [[1, 2], [0, 1]]


def test_a_step_ahead_sends_nothing_while_its_rows_keep_their_pages(
    build_device: Build, num_ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("lsf", max_position_embeddings=200)
    engine, sent = build_device(model, headroom_tokens=0), []
    if engine._worker.ahead.capture is None:
        pytest.skip("each step has inputs of its own where none is recorded")
    send = Staging.send
    monkeypatch.setattr(Staging, "send", lambda one: sent.append(len(num_ahead)) or send(one))
    texts = prompts(9, [20, 20])
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 50)
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(2)] == [uncached(model, t, 50) for t in texts]
    assert num_ahead == [2] * 49
    # Pages of 16 tokens: the rows' first step, and those of the 33rd, 49th and 65th token.
    assert sent == [0, 12, 28, 44]


@pytest.mark.parametrize("mix", ["f", "llf"])
@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_prompts_of_one_token_leave_other_requests_their_tokens(
    mix: str, num_rows: int, build_device: Build, num_ahead: list[int]
) -> None:
    """Such a prompt is a decoding step, which may use the buffers of the one before it."""
    model = shared_model(mix)
    texts = prompts(1, [20] * num_rows + [1] * num_rows, shared=0)
    engine, events = build_device(model, max_running=8), {}

    def take(steps: int) -> None:
        for event in (event for _ in range(steps) for event in engine.step()):
            events.setdefault(event.request_id, []).append(event)

    for n in range(num_rows):
        submit(engine, str(n), texts[n], 12)
    take(4)
    for n in range(num_rows, 2 * num_rows):
        submit(engine, str(n), texts[n], 12)
    while engine.has_work:
        take(1)
    assert [tokens(events[str(n)]) for n in range(len(texts))] == [
        uncached(model, text, 12) for text in texts
    ]
    assert num_ahead
