"""Continuous batching: the same greedy tokens whatever the cache, the chunks and the company."""

import random

import pytest
import torch
from engine_helpers import shared_model, tiny_model, uncached
from tokenizers import Tokenizer

from sevenfold.config import UnsupportedError
from sevenfold.engine import SamplingParams
from sevenfold.engine.engine import Engine
from sevenfold.engine.events import TokenEvent
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel

PAGE_TOKENS, CONTEXT_TOKENS = 16, 160
MIXES = ["ll", "ff", "lsf", "lllf"]
GREEDY = {"temperature": 0.0}


def build(model: HybridModel, tokenizer: Tokenizer, *, slabs: int = 64, **limits: float) -> Engine:
    enough = 1 << 30
    size = {"context_tokens": CONTEXT_TOKENS, "page_tokens": PAGE_TOKENS, "kv_element_bytes": 4}
    slab = plan_memory(model.config, budget_bytes=enough, **size).layout.slab_bytes
    plan = plan_memory(model.config, budget_bytes=slabs * slab, **size)
    config = SchedulerConfig(
        max_request_tokens=plan.longest_context_tokens or CONTEXT_TOKENS,
        page_tokens=PAGE_TOKENS,
        **{"min_chunk_tokens": 16, "max_step_tokens": 400} | limits,
    )
    return Engine(model, tokenizer, plan, config)


def run(engine: Engine, most_steps: int = 2000) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            return events
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError(f"the engine must come to an end in {most_steps} steps")


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def submit(engine: Engine, name: str, prompt: list[int], num_tokens: int, **options) -> Request:
    salt, priority = options.pop("salt", b""), options.pop("priority", 0)
    request = Request(
        name,
        tuple(prompt),
        num_tokens,
        salt=salt,
        priority=priority,
        marks=options.pop("marks", ()),
    )
    engine.submit(request, SamplingParams(max_tokens=num_tokens, **(GREEDY | options)))
    return request


def prompts(seed: int, lengths: list[int], shared: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    head = [draw.randrange(300) for _ in range(shared)]
    return [head + [draw.randrange(300) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module", params=MIXES)
def model(request: pytest.FixtureRequest) -> HybridModel:
    return shared_model(request.param)


def test_a_crowd_gets_what_each_gets_alone(model: HybridModel, tokenizer: Tokenizer) -> None:
    texts = prompts(0, [1, 70, 3, 17, 16, 40, 33])
    wanted = [uncached(model, prompt, 9) for prompt in texts]
    for limits in ({}, {"max_running": 2, "max_step_tokens": 34, "max_prefills": 2}):
        engine = build(model, tokenizer, **limits)
        for n, prompt in enumerate(texts):
            submit(engine, str(n), prompt, 9)
        events = run(engine)
        assert [tokens(events[str(n)]) for n in range(len(texts))] == wanted
        assert all(events[str(n)][-1].finish_reason == "length" for n in range(len(texts)))
    usage = engine.cache.usage()
    engine.cache.clear()
    assert engine.cache.usage() != usage, "what was cached can be given back"


def test_clearing_behind_a_last_token_leaves_nothing(
    model: HybridModel, tokenizer: Tokenizer
) -> None:
    (text,) = prompts(3, [85])
    engine = build(model, tokenizer)
    before = engine.cache.usage().num_items
    request = Request("first", tuple(text), 1, session="mine")
    engine.submit(request, SamplingParams(max_tokens=1, **GREEDY))
    while request.finish_reason is None:
        engine.step()
    engine.clear_cache()
    run(engine)
    assert (engine.cache.usage().num_items, engine.cache.num_sessions) == (before, 0)


def test_an_id_may_be_used_again_behind_its_last_token(
    model: HybridModel, tokenizer: Tokenizer
) -> None:
    first, second = prompts(4, [20, 31])
    wanted = uncached(model, second, 3)
    engine = build(model, tokenizer)
    request = submit(engine, "same", first, 1)
    while request.finish_reason is None:
        engine.step()
    submit(engine, "same", second, 3)
    assert tokens(run(engine)["same"]) == wanted


def test_requests_that_come_later_and_preemption(model: HybridModel, tokenizer: Tokenizer) -> None:
    texts = prompts(1, [50, 60, 41, 20], shared=30)
    wanted = [uncached(model, prompt, 30) for prompt in texts]
    # Memory for about two of them: some must wait, or lose their memory and come back.
    engine = build(model, tokenizer, slabs=20, headroom_tokens=0)
    events: dict[str, list[TokenEvent]] = {}
    for n, prompt in enumerate(texts):
        submit(engine, str(n), prompt, 30, priority=n)
        for _ in range(3):
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
    for name, more in run(engine).items():
        events.setdefault(name, []).extend(more)
    assert [tokens(events[str(n)]) for n in range(4)] == wanted


def test_the_second_turn_goes_on_from_the_first(model: HybridModel, tokenizer: Tokenizer) -> None:
    (first,) = prompts(2, [85])
    engine = build(model, tokenizer)
    before = submit(engine, "first", first, 8, marks=(85,))
    answer = tokens(run(engine)["first"])
    second = [*first, *answer, 7, 8, 9]
    other = submit(engine, "second", second, 8)
    found = tokens(run(engine)["second"])
    assert found == uncached(model, second, 8)
    assert before.num_cached_tokens == 0
    assert other.num_cached_tokens >= 80
    stranger = submit(engine, "stranger", second, 8, salt=b"another key")
    assert tokens(run(engine)["stranger"]) == found
    assert stranger.num_cached_tokens == 0


def test_a_prefix_that_many_share(model: HybridModel, tokenizer: Tokenizer) -> None:
    texts = prompts(3, [9, 14, 21, 5], shared=70)
    engine = build(model, tokenizer)
    requests = []
    for n, prompt in enumerate(texts):
        requests.append(submit(engine, str(n), prompt, 6))
        assert tokens(run(engine)[str(n)]) == uncached(model, prompt, 6)
    assert requests[0].num_cached_tokens == 0
    # The second branches off where nobody had kept a state; from the third on there is one.
    assert all(request.num_cached_tokens >= 64 for request in requests[2:])
    assert engine.counters().num_hits >= 2


def test_nothing_of_one_request_reaches_another(model: HybridModel, tokenizer: Tokenizer) -> None:
    """A request full of NaN fails alone, and whoever gets its memory next is not touched by it."""
    poisoned = tiny_model_with_nan(model, token=299)
    engine = build(poisoned, tokenizer, slabs=24)
    good, bad = [5, 6, 7, 8], [299, *range(40)]
    wanted = uncached(model, good, 6)
    submit(engine, "bad", bad, 6)
    submit(engine, "good", good, 6)
    events = run(engine)
    assert tokens(events["good"]) == wanted
    assert events["bad"][-1].finish_reason == "error"
    for n in range(6):
        submit(engine, str(n), good, 6)
        assert tokens(run(engine)[str(n)]) == wanted


def tiny_model_with_nan(model: HybridModel, token: int) -> HybridModel:
    other = HybridModel(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.embed_tokens.weight[token] = float("nan")
    return other.eval().requires_grad_(False)


def test_cancelling_frees_at_the_next_step(model: HybridModel, tokenizer: Tokenizer) -> None:
    engine = build(model, tokenizer)
    idle = engine.cache.usage()
    submit(engine, "long", prompts(4, [90])[0], 50)
    for _ in range(4):
        engine.step()
    assert engine.cancel("long")
    (event,) = engine.step()
    assert (event.token_id, event.finish_reason) == (None, "cancelled")
    engine.cache.clear()
    assert engine.cache.usage() == idle
    assert not engine.has_work
    assert not engine.cancel("long")


def test_what_was_cancelled_can_be_gone_on_from(model: HybridModel, tokenizer: Tokenizer) -> None:
    engine = build(model, tokenizer)
    (prompt,) = prompts(4, [90])
    submit(engine, "first", prompt, 50, marks=(80,))
    for _ in range(4):
        engine.step()
    engine.cancel("first")
    engine.step()
    again = submit(engine, "again", prompt, 5)
    assert tokens(run(engine)["again"]) == uncached(model, prompt, 5)
    assert again.num_cached_tokens >= 80


def test_sampling_is_the_same_alone_and_in_company(tokenizer: Tokenizer) -> None:
    model = tiny_model("lsf")
    texts = prompts(5, [12, 30, 5])
    alone = []
    for n, prompt in enumerate(texts):
        engine = build(model, tokenizer)
        submit(engine, "one", prompt, 12, temperature=1.1, seed=n, presence_penalty=0.7)
        alone.append(tokens(run(engine)["one"]))
    engine = build(model, tokenizer)
    for n, prompt in enumerate(texts):
        options = {"temperature": 1.1, "seed": n, "presence_penalty": 0.7}
        submit(engine, str(n), prompt, 12, **options)
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(3)] == alone
    assert len({tuple(one) for one in alone}) == 3


def test_stop_strings_and_tokens_end_a_request(tokenizer: Tokenizer) -> None:
    model = tiny_model("lf")
    (prompt,) = prompts(6, [10])
    usual = uncached(model, prompt, 12)
    engine = build(model, tokenizer)
    submit(engine, "token", prompt, 12, stop_token_ids=(usual[4],))
    text = tokenizer.decode(usual)
    stop = text[3:5]
    submit(engine, "text", prompt, 12, stop=(stop,))
    events = run(engine)
    assert tokens(events["token"]) == usual[: usual.index(usual[4]) + 1]
    assert events["token"][-1].finish_reason == "stop"
    shown = "".join(event.text for event in events["text"])
    assert shown == text[: text.find(stop)]
    assert events["text"][-1].finish_reason == "stop"


def test_refusals(tokenizer: Tokenizer) -> None:
    model = tiny_model("lf")
    engine = build(model, tokenizer)
    with pytest.raises(
        ValueError, match=r"request.max_tokens must be params.max_tokens = 4, got 3"
    ):
        engine.submit(Request("a", (1,), 3), SamplingParams(max_tokens=4))
    assert not engine.has_work
    size = {"budget_bytes": 1 << 20, "context_tokens": 32}
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    whole = plan_memory(model.config, **size)
    with pytest.raises(UnsupportedError, match="must be bf16, fp16 or fp32 to serve"):
        Storage(model.config, whole, **(where | {"dtype": torch.float64}))
