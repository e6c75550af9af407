"""An engine that guesses begins steps ahead where there is nothing to guess, and only there."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from device_helpers import FakeCapture, new_runner
from engine_helpers import shared_model, uncached
from speculation_helpers import CHAIN, TREE, build, is_idle, repeating, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine import worker as worker_module
from sevenfold.engine.ahead import Ahead
from sevenfold.engine.engine import Engine
from sevenfold.engine.speculation import PromptLookupConfig, SpeculationConfig, prompt_lookup

RESTING = CHAIN.model_copy(update={"min_match_tokens": 8})  # finds next to nothing


@pytest.fixture
def build_device(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Callable[[SpeculationConfig], Engine]:
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, FakeCapture(), (1, 2, 4)),
    )
    return lambda mode: build(shared_model("lsf"), tokenizer, mode)


@pytest.fixture
def num_launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    launch = Ahead.launch

    def watched(self: Ahead, *args):
        begun = launch(self, *args)
        found.extend([] if begun is None else [len(begun.requests)])
        return begun

    monkeypatch.setattr(Ahead, "launch", watched)
    return found


@pytest.mark.parametrize("mode", [CHAIN, TREE, RESTING], ids=["chain", "tree", "few matches"])
def test_the_tokens_are_those_of_each_alone(
    mode: SpeculationConfig,
    build_device: Callable[[SpeculationConfig], Engine],
    num_launched: list[int],
) -> None:
    engine = build_device(mode)
    idle, texts = engine.cache.usage(), repeating(0, [1, 70, 17, 40])
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 40)
    found, wanted = run(engine), [uncached(engine._worker.model, text, 40) for text in texts]
    assert [tokens(found[str(n)]) for n in range(len(texts))] == wanted
    assert engine._ahead.chosen is None
    assert is_idle(engine, idle)
    assert num_launched
    assert engine.speculation_counters().num_accepted_tokens > 0 or mode is RESTING


def test_nothing_is_begun_ahead_while_there_are_guesses(
    build_device: Callable[[SpeculationConfig], Engine], num_launched: list[int]
) -> None:
    engine = build_device(CHAIN)
    submit(engine, "one", [7, 8, 9] * 20, 40)
    did: list[tuple[int, int]] = []  # steps begun ahead, and drafts, of each step
    drafts = 0
    while engine.has_work:
        launched = len(num_launched)
        engine.step()
        made = engine.speculation_counters().num_drafts
        did.append((len(num_launched) - launched, made - drafts))
        drafts = made
    assert drafts > 0
    assert all(not (begun and drafted) for begun, drafted in did)
    # The step behind one that was begun ahead is that one: it checks no guesses.
    for (begun, _), (_, drafted) in pairwise(did):
        assert not (begun and drafted)


@pytest.mark.parametrize("mode", [None, PromptLookupConfig()], ids=["plain", "watching"])
def test_hostile_text_takes_the_steps_of_plain_decoding(
    mode: SpeculationConfig | None,
    build_device: Callable[[SpeculationConfig | None], Engine],
    num_launched: list[int],
) -> None:
    """There is always a guess, and it is always wrong: no step waits for the host on its account,
    the first after the prompt neither."""
    engine, wanted = build_device(mode), uncached(shared_model("lsf"), [1, 2, 3], 30)
    never = next(token for token in range(300) if token not in wanted)
    asked: list[int] = []

    def wrong(asks: list) -> list:
        asked.extend(len(ask.request.generated) for ask in asks)
        return [[[never, never]] for _ in asks]

    if mode is not None:
        engine._speculator._drafter.propose = wrong
        engine._speculator._times.wants_plain = lambda _: False
    submit(engine, "a", [1, 2, 3], 30)
    assert tokens(run(engine)["a"]) == wanted
    assert len(num_launched) == 29
    # A guess is looked up anew after each that was wrong.
    assert asked == ([] if mode is None else list(range(1, 30)))


def test_a_prompt_is_read_while_it_is_computed(tokenizer: Tokenizer) -> None:
    engine = build(
        shared_model("lsf"), tokenizer, CHAIN, max_step_tokens=34, max_running=2, max_prefills=2
    )
    submit(engine, "a", list(range(100)), 5)
    index = engine._speculator._drafter._indexed
    for _ in range(4):
        engine.step()
        request = engine._underway["a"].request
        assert index["a"].num_tokens >= request.num_computed_tokens
    assert engine.speculation_counters().num_drafts == 0
    run(engine)
    assert not index


@pytest.mark.parametrize("is_adaptive", [True, False], ids=["watched", "at once"])
def test_prompts_from_the_cache_are_guessed_from_soon(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, *, is_adaptive: bool
) -> None:
    """Next turns of eight conversations: no chunk of theirs is computed, but the last."""
    monkeypatch.setattr(prompt_lookup, "MOST_READ_TOKENS", 112)
    mode = CHAIN.model_copy(update={"adaptive": is_adaptive})
    engine = build(
        shared_model("lsf"), tokenizer, mode, slabs=400, max_running=32, max_step_tokens=4000
    )
    texts = repeating(3, [112] * 8)
    for name, num_tokens in (("first", 2), ("next", 40)):
        for n, text in enumerate(texts):
            submit(engine, f"{name} {n}", text, num_tokens)
        if name == "first":
            run(engine)
    found, index = [], engine._speculator._drafter._indexed
    for _ in range(9):
        engine.step()
        found.append(sum(one.num_tokens >= 112 for one in index.values()))
    # The first step computes the last tokens of each: one prompt is read a step, and these.
    assert all(n + 1 <= num for n, num in enumerate(found[:8]))
    assert found[8] == 8
    run(engine)
    assert engine.speculation_counters().num_drafts > 0 or is_adaptive
    assert not index
