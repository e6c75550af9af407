"""Speculation changes no token: greedy or sampled, whatever is guessed, and whatever is beside."""

import copy
from functools import cache
from itertools import count

import numpy as np
import pytest
import torch
from engine_helpers import shared_model, uncached
from speculation_helpers import (
    CHAIN,
    PAGE_TOKENS,
    SMALLER,
    TREE,
    build,
    is_idle,
    repeating,
    run,
    submit,
    tokens,
)
from tokenizers import Tokenizer

from sevenfold.engine.cache.arena import index_of
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.engine import Engine
from sevenfold.engine.speculation import DraftModel, PromptLookupConfig
from sevenfold.engine.speculation.drafter import Ask
from sevenfold.engine.speculation.pace import FEWEST_SAMPLES
from sevenfold.models import Batch, HybridModel, LinearState, empty_state
from sevenfold.ops.testing import check_error

MODES = {"off": None, "chain": CHAIN, "tree": TREE, "model": SMALLER}
MODES["model tree"] = SMALLER.model_copy(update={"draft_tokens": 6, "branches": 2})
SPECULATING = ["chain", "tree", "model tree"]
CASES = [
    ("ll", "chain"),
    ("ll", "tree"),
    ("ff", "chain"),
    ("ff", "tree"),
    ("lsf", "chain"),
    ("lsf", "model tree"),
    ("llsl", "tree"),
    ("llsl", "model"),
]
# Every mix and every mode, though not each of them with two.
FEW = [CASES[n] for n in (0, 3, 5, 7)]


def engine_of(
    mode: str, model: HybridModel, tokenizer: Tokenizer, *, slabs: int = 64, **limits: float
) -> Engine:
    draft = DraftModel(nearly(model), tokenizer) if "model" in mode else None
    return build(model, tokenizer, MODES[mode], draft, slabs=slabs, **limits)


def nearly(model: HybridModel) -> HybridModel:
    """A model that often, but not always, agrees with another."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def accepted(engine: Engine) -> int:
    counters = engine.speculation_counters()
    return 0 if counters is None else counters.num_accepted_tokens


@pytest.mark.parametrize(("layers", "mode"), CASES)
def test_greedy_tokens_of_a_crowd(tokenizer: Tokenizer, layers: str, mode: str) -> None:
    model, texts = shared_model(layers), repeating(0, [1, 70, 17, 40])
    wanted = crowd_alone(layers)
    # All at once, or two at a time by small chunks.
    few = {"max_running": 2, "max_step_tokens": 34, "max_prefills": 2}
    engine = engine_of(mode, model, tokenizer, **(few if CASES.index((layers, mode)) % 2 else {}))
    idle = engine.cache.usage()
    requests = [submit(engine, str(n), text, 24) for n, text in enumerate(texts)]
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(len(texts))] == wanted
    assert accepted(engine) == sum(r.num_accepted_tokens for r in requests) > 0
    assert is_idle(engine, idle)


@cache
def crowd_alone(layers: str) -> list[list[int]]:
    return [uncached(shared_model(layers), text, 24) for text in repeating(0, [1, 70, 17, 40])]


@pytest.mark.parametrize("mode", SPECULATING)
def test_sampled_tokens_with_every_rule(tokenizer: Tokenizer, mode: str) -> None:
    """A seed gives the tokens that it gives without speculation, and their log probabilities."""
    rules = [
        {"temperature": 0.3, "seed": 1},
        {"temperature": 0.4, "seed": 2**63 + 5, "top_k": 9, "presence_penalty": 0.6},
        {"temperature": 0.5, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": -0.4},
        {"temperature": 0.4, "seed": 4, "top_p": 0.8, "min_p": 0.01, "logit_bias": {7: 3.0}},
        {"temperature": 0.0, "frequency_penalty": -0.5, "logprobs": 2},
    ]
    found = {}
    for name in ("off", mode):
        engine = engine_of(name, shared_model("lsf"), tokenizer)
        for n, (text, rule) in enumerate(zip(repeating(1, [30] * 5), rules, strict=True)):
            submit(engine, str(n), text, 30, **rule)
        events = run(engine)
        found[name] = [tokens(events[str(n)]) for n in range(5)]
        best = [[i for i, _ in event.logprobs.top] for event in events["4"]]
        found[name].append(best)
        assert accepted(engine) > 0 or name == "off"
    assert found[mode] == found["off"]


def test_drafted_and_plain_steps_take_turns(tokenizer: Tokenizer) -> None:
    """What the sampler keeps from step to step is that of all tokens, however they came."""
    rule = {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.9}
    found = {}
    for mode in ("off", "chain"):
        engine, turn = engine_of(mode, shared_model("lsf"), tokenizer), count()
        if mode == "chain":
            engine._speculator._drafter.propose = lambda asks, turn=turn: [
                [] if next(turn) % 3 else [found["off"][len(ask.request.generated) :][:2]]
                for ask in asks
            ]
        submit(engine, "a", [5, 6, 7], 30, **rule)
        found[mode] = tokens(run(engine)["a"])
    assert found["chain"] == found["off"]
    assert accepted(engine) >= 10


@pytest.mark.parametrize(("layers", "mode"), CASES[-4:])
def test_ends(tokenizer: Tokenizer, layers: str, mode: str) -> None:
    """Stop tokens, stop strings and min_tokens end an output inside a draft where they would."""
    (text,) = repeating(2, [40])
    usual = uncached(shared_model(layers), text, 30)
    shown = tokenizer.decode(usual)
    cases = [
        {"stop_token_ids": (usual[9],)},
        {"stop_token_ids": (usual[9],), "min_tokens": 15},
        {"stop": (shown[11:14],)},
        {"num_tokens": 1},
        {"num_tokens": 2},
        {"num_tokens": 7},
    ]
    found = {}
    for name in ("off", mode):
        engine = engine_of(name, shared_model(layers), tokenizer)
        idle = engine.cache.usage()
        for n, case in enumerate(cases):
            options = dict(case)
            submit(engine, str(n), text, options.pop("num_tokens", 30), **options)
        events = run(engine)
        found[name] = [
            (
                tokens(events[str(n)]),
                "".join(event.text for event in events[str(n)]),
                events[str(n)][-1].finish_reason,
                [event.finish_reason for event in events[str(n)][:-1]],
            )
            for n in range(len(cases))
        ]
        assert is_idle(engine, idle)
    assert found[mode] == found["off"]


@pytest.mark.parametrize(("layers", "mode"), FEW)
def test_preemption_and_requests_that_come_later(
    tokenizer: Tokenizer, layers: str, mode: str
) -> None:
    model, texts = shared_model(layers), repeating(3, [50, 60, 41, 20])
    wanted = late_alone(layers)
    # Memory for about two of them: some must wait, or lose their memory and come back.
    slabs = {"ll": 3, "ff": 13, "lsf": 7, "llsl": 6}[layers]
    engine = engine_of(mode, model, tokenizer, slabs=slabs, headroom_tokens=0)
    idle = engine.cache.usage()
    got: dict[str, list[int]] = {}
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 24, priority=n)
        for _ in range(2):
            for event in engine.step():
                got.setdefault(event.request_id, []).append(event.token_id)
    for name, events in run(engine).items():
        got.setdefault(name, []).extend(tokens(events))
    assert [got[str(n)] for n in range(4)] == wanted
    assert engine.scheduler.num_preemptions > 0
    assert is_idle(engine, idle)


@cache
def late_alone(layers: str) -> list[list[int]]:
    return [uncached(shared_model(layers), text, 24) for text in repeating(3, [50, 60, 41, 20])]


@pytest.mark.parametrize(("layers", "mode"), FEW)
def test_states_that_are_kept_while_drafts_run(
    tokenizer: Tokenizer, layers: str, mode: str
) -> None:
    """Later turns go on from snapshots taken inside drafts, and find the tokens of no cache."""
    model, (text,) = shared_model(layers), repeating(4, [50])
    engine = engine_of(mode, model, tokenizer)
    idle = engine.cache.usage()
    answer = tokens(chat(engine, text, 80))
    # Turns that leave the first one's path at different places of its output.
    for kept in (20, 79):
        second = [*text, *answer[:kept], 7, 8, 9]
        request = submit(engine, str(kept), second, 8)
        found = tokens(run(engine)[str(kept)])
        assert found == uncached(model, second, 8)
        assert request.num_cached_tokens >= (48 if kept == 20 else 112)
    assert is_idle(engine, idle)


def chat(engine: Engine, text: list[int], num_tokens: int) -> list:
    submit(engine, "first", text, num_tokens, marks=(len(text),))
    return run(engine)["first"]


@pytest.mark.parametrize("mode", ["chain", "tree"])
@pytest.mark.parametrize("layers", ["ll", "lsf"])
def test_a_state_kept_inside_a_draft_is_exact(tokenizer: Tokenizer, layers: str, mode: str) -> None:
    """A border of blocks that lies amid accepted guesses: the state there, and no token more."""
    model, (text,) = shared_model(layers), repeating(8, [50])
    engine = engine_of(mode, model, tokenizer)
    answer = uncached(model, text, 90)

    def right(ask: Ask) -> list[list[int]]:
        guesses = answer[len(ask.request.generated) :][: ask.num_tokens]
        wrong = [(token + 1) % 300 for token in guesses]
        return [guesses] if mode == "chain" else [wrong, guesses]

    engine._speculator._drafter.propose = lambda asks: [right(ask) for ask in asks]
    request = submit(engine, "a", text, 90)
    assert tokens(run(engine)["a"]) == answer
    assert request.num_accepted_tokens > 50
    key = KeyChain(request, PAGE_TOKENS).key(128 // PAGE_TOKENS - 1)
    at = index_of(engine.cache._tree.get(key).anchor.snapshot)
    kept = [
        layer.snapshots.exact[at]
        for layer in engine._worker.storage.layers
        if hasattr(layer, "snapshots")
    ]
    row = torch.tensor([[*text, *answer[: 128 - 50]]])
    states = [
        [layer.kv[0] for layer in states_after(m, row) if isinstance(layer, LinearState)]
        for m in (model, copy.deepcopy(model).double())
    ]
    for found, honest, exact in zip(kept, *states, strict=True):
        check_error("state", found, honest, exact)


def states_after(model: HybridModel, row: torch.Tensor) -> tuple:
    where = {"device": model.device, "dtype": model.dtype}
    batch = Batch.rows(1, row.shape[1], device=model.device)
    return model.hidden(row, batch, empty_state(model.config, 1, 200, **where)).state


@pytest.mark.parametrize("mode", SPECULATING)
def test_some_speculate_and_some_do_not(tokenizer: Tokenizer, mode: str) -> None:
    """A chain beside a tree beside rows without a match, some of which end, are cancelled, fail."""
    model = shared_model("lsf")
    text, plain = repeating(5, [60])[0], list(range(40))
    wanted = [uncached(model, text, 30), uncached(model, plain, 30)]
    engine = engine_of(mode, model, tokenizer)
    idle = engine.cache.usage()
    submit(engine, "copies", text, 30)
    submit(engine, "cancelled", text[:50], 60)
    submit(engine, "hostile", plain, 30)
    got: dict[str, list[int]] = {"copies": [], "hostile": [], "cancelled": []}
    for n in count():
        if not engine.has_work:
            break
        if n == 8:
            assert engine.cancel("cancelled")
        for event in engine.step():
            got[event.request_id] += [] if event.token_id is None else [event.token_id]
    assert [got["copies"], got["hostile"]] == wanted
    alone = uncached(model, text[:50], len(got["cancelled"]))
    assert got["cancelled"] == alone
    assert is_idle(engine, idle)


class Alternating:
    """A grammar: an even token, an odd one, and so on, so many of them; it cannot be undone."""

    def __init__(self, num_tokens: int) -> None:
        self.taken: list[int] = []
        self.num_tokens = num_tokens

    def fill(self, mask: np.ndarray) -> None:
        allowed = np.zeros(len(mask) * 32, dtype=np.uint8)
        allowed[len(self.taken) % 2 : 300 : 2] = 1
        mask[:] = np.packbits(allowed, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> bool:
        if token_id % 2 != len(self.taken) % 2:
            return False
        self.taken.append(token_id)
        return True

    def finished(self) -> bool:
        return len(self.taken) == self.num_tokens

    def problem(self) -> str | None:
        return None


@pytest.mark.parametrize("mode", SPECULATING)
def test_grammars_see_accepted_tokens_only(tokenizer: Tokenizer, mode: str) -> None:
    (text,) = repeating(6, [60])
    rules = [{}, {"temperature": 0.4, "seed": 6}, {"frequency_penalty": -0.6}]
    found = {}
    for name in ("off", mode):
        engine = engine_of(name, shared_model("lsf"), tokenizer)
        grammars = [Alternating(24) for _ in rules]
        for n, (rule, grammar) in enumerate(zip(rules, grammars, strict=True)):
            submit(engine, str(n), text, 40, constraint=grammar, **rule)
        submit(engine, "free", text, 40)
        events = run(engine)
        found[name] = [tokens(events[key]) for key in ("0", "1", "2", "free")]
        assert [grammar.taken for grammar in grammars] == found[name][:3]
        assert all(len(taken) == 24 for taken in found[name][:3])
    assert found[mode] == found["off"]


@pytest.mark.parametrize(("layers", "mode"), CASES[1:5])
def test_a_poisoned_guess_spoils_nothing(tokenizer: Tokenizer, layers: str, mode: str) -> None:
    """A token that makes everything NaN stands in the history that guesses come from."""
    model = shared_model(layers)
    poisoned = HybridModel(model.config)
    poisoned.load_state_dict(model.state_dict())
    (text,) = repeating(7, [40])
    # Where lengths differ, a short one's places behind its end are read, and hidden by a mask.
    texts = [text, text[:33], text[:26]]
    wanted = [uncached(model, text, 24) for text in texts]
    never = next(t for t in range(300) if all(t not in row for row in (text, *wanted)))
    with torch.no_grad():
        poisoned.embed_tokens.weight[never] = float("nan")
    engine = engine_of(mode, poisoned.eval().requires_grad_(False), tokenizer)
    idle = engine.cache.usage()
    propose, turn = engine._speculator._drafter.propose, count()

    def with_poison(asks):
        """Every second draft holds the token: as its first guess, or as its second."""
        return [
            [[*path[: next(turn) % 2], never] for path in paths[:1]] if next(turn) % 2 else paths
            for paths in propose(asks)
        ]

    engine._speculator._drafter.propose = with_poison
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 24, salt=bytes([n]))
    submit(engine, "bad", [*text, never], 24)
    events = run(engine)
    assert [tokens(events[str(n)]) for n in range(3)] == wanted
    assert events["bad"][-1].finish_reason == "error"
    # Compiled loops of lightning layers never read a guess that a token does not see.
    assert (engine.speculation_counters().num_spoilt_drafts > 0) == (layers != "ll")
    assert is_idle(engine, idle)


def test_drafts_only_where_they_pay(tokenizer: Tokenizer) -> None:
    """An engine drafts where its guesses were seen to be right, and not where they were not."""
    model, config = shared_model("ll"), PromptLookupConfig(min_match_tokens=1)
    engine = build(model, tokenizer, config)
    # As if a step with drafts cost half as much again, whatever this machine does meanwhile.
    times = engine._speculator._times
    times.note_plain = lambda *_: None
    times.note_drafted = lambda *_: 1.5
    times.in_steps = lambda *_: 1.0
    times.wants_plain = lambda _: False
    times.cost = lambda *_: 1.5
    wanted = uncached(model, list(range(40)), 80)
    never = next(token for token in range(300) if token not in wanted)
    drafted = {}
    for name, wrong in (("wrong", True), ("right", False), ("wrong again", True)):
        engine._speculator._drafter.propose = lambda asks, wrong=wrong: [
            [[never] * 3 if wrong else wanted[len(ask.request.generated) :][: ask.num_tokens]]
            for ask in asks
        ]
        request = submit(engine, name, list(range(40)), 80)
        assert tokens(run(engine)[name]) == wanted
        drafted[name] = (request.num_drafted_tokens, request.num_accepted_tokens)
    assert drafted["right"][0] == drafted["right"][1] > 50
    assert drafted["wrong"] == drafted["wrong again"] == (0, 0)


def test_a_measuring_engine_begins_without_drafts(tokenizer: Tokenizer) -> None:
    model, (text,) = shared_model("lsf"), repeating(0, [70])
    engine = build(model, tokenizer, PromptLookupConfig(min_match_tokens=1))
    submit(engine, "a", text, 30)
    for _ in range(1 + FEWEST_SAMPLES):
        engine.step()
        assert engine.speculation_counters().num_drafts == 0
    run(engine)
    assert engine.speculation_counters().num_drafts > 0


def test_nothing_is_noted_without_speculation(tokenizer: Tokenizer) -> None:
    engine = engine_of("off", shared_model("lsf"), tokenizer)
    request = submit(engine, "a", [1, 2, 3], 4)
    run(engine)
    assert engine.speculation_counters() is None
    assert (request.num_drafted_tokens, request.num_accepted_tokens) == (0, 0)
