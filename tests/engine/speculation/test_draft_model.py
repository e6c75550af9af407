"""The smaller model: whose tokens it must have, what memory it holds, what it guesses."""

import pytest
import torch
from device_helpers import FakeCapture, new_runner
from engine_helpers import tiny_model, uncached
from speculation_helpers import SMALLER, build, is_idle, repeating, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.config import ConfigError
from sevenfold.engine import engine as engine_module
from sevenfold.engine import worker as worker_module
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.request import Request
from sevenfold.engine.rows import Row
from sevenfold.engine.sampling import Output, SamplingParams
from sevenfold.engine.speculation import DraftModel
from sevenfold.engine.speculation import speculator as speculator_module
from sevenfold.engine.speculation.draft_model import ModelDrafter
from sevenfold.engine.speculation.drafter import Ask
from sevenfold.engine.speculation.pace import CREDIT_RATE, FIRST_CREDIT


def test_another_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    model = tiny_model("lsf")
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["heron!"])
    with pytest.raises(ConfigError, match="must have the model's tokens under the same ids, got"):
        build(model, tokenizer, SMALLER, DraftModel(model, other))
    wider = DraftModel(tiny_model("l", vocab_size=310), tokenizer)
    with pytest.raises(ConfigError, match="vocab_size must be the model's, 300, got 310"):
        build(model, tokenizer, SMALLER, wider)


def test_too_little_memory_is_refused_with_the_sum(tokenizer: Tokenizer) -> None:
    model = tiny_model("ll")
    for num_bytes, message in (
        (2048, "memory_bytes must hold 2 states of the draft model and 0 pages for 160 tokens, wh"),
        (1024, "memory_bytes is the draft model's budget: budget_bytes must hold one request of"),
    ):
        config = SMALLER.model_copy(update={"memory_bytes": num_bytes})
        with pytest.raises(ConfigError, match=message):
            build(model, tokenizer, config, DraftModel(model, tokenizer))


def ask(request: Request, num_tokens: int = 4, branches: int = 1, **rules: object) -> Ask:
    params = SamplingParams(max_tokens=request.max_tokens, **({"temperature": 0.0} | rules))
    output = Output(params, request.prompt, (), request.generated)
    return Ask(request, output, num_tokens, branches)


@pytest.mark.parametrize("layers", ["ll", "ff", "lsf"])
def test_guesses_are_what_the_smaller_model_would_say(tokenizer: Tokenizer, layers: str) -> None:
    """Whatever was rejected before: after each token, its own continuation of all tokens."""
    model = tiny_model(layers, max_position_embeddings=200)
    drafter = ModelDrafter(
        SMALLER.model_copy(update={"max_chunk_tokens": 16}), DraftModel(model, tokenizer)
    )
    texts = repeating(0, [20, 5])
    requests = [Request(str(n), tuple(text), 60) for n, text in enumerate(texts)]
    for n, other in enumerate([3, 200, 17, 4, 250, 9]):
        for request in requests:
            request.generated += [other, other + 1][: 1 + n % 2]
        found = drafter.propose([ask(request) for request in requests])
        wanted = [[uncached(model, list(request.tokens), 4)] for request in requests]
        # A prompt that is longer than a chunk takes two steps.
        assert found == ([[], wanted[1]] if n == 0 else wanted)


def test_a_tree_is_the_chain_and_what_else_was_likely(tokenizer: Tokenizer) -> None:
    model = tiny_model("lf")
    drafter = ModelDrafter(SMALLER, DraftModel(model, tokenizer))
    request = Request("a", (5, 6, 7), 30)
    request.generated.append(8)
    chain, *others = drafter.propose([ask(request, 3, 2)])[0]
    assert chain == uncached(model, [5, 6, 7, 8], 3)
    for depth, other in enumerate(others):
        z = model(torch.tensor([[5, 6, 7, 8, *chain[:depth]]]))[0, -1]
        assert other == [*chain[:depth], z.topk(2).indices[1].item()]
    assert len(others) == 3


def test_a_sampled_draft_takes_the_requests_own_draws(tokenizer: Tokenizer) -> None:
    """The same model as the drafter guesses every token: the draws are the same."""
    model = tiny_model("lsf", max_position_embeddings=200)
    engine = build(model, tokenizer, SMALLER, DraftModel(model, tokenizer))
    requests = [submit(engine, str(n), [n, 4, 9], 40, temperature=1.0, seed=n) for n in range(3)]
    run(engine)
    assert all(r.num_accepted_tokens == r.num_drafted_tokens > 0 for r in requests)


def test_without_memory_a_request_goes_on_without_drafts(tokenizer: Tokenizer) -> None:
    model = tiny_model("lsf", max_position_embeddings=200)
    texts, drafted = repeating(1, [60] * 4), []
    for memory_bytes in (35_000, 1 << 20):
        config = SMALLER.model_copy(update={"memory_bytes": memory_bytes, "context_tokens": 100})
        engine = build(model, tokenizer, config, DraftModel(model, tokenizer))
        idle, arena = engine.cache.usage(), engine._speculator._drafter._arena
        empty = arena.usage()
        requests = [submit(engine, str(n), text, 12) for n, text in enumerate(texts)]
        events = run(engine)
        for n, text in enumerate(texts):
            assert tokens(events[str(n)]) == uncached(model, text, 12)
        drafted.append(sum(request.num_drafted_tokens for request in requests))
        assert is_idle(engine, idle)
        assert arena.usage() == empty
    assert 0 < drafted[0] < drafted[1]


def test_its_kernels_are_compiled_on_memory_of_nobody(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, FakeCapture(), (1, 2, 4)),
    )
    model, shapes = tiny_model("lsf", max_position_embeddings=200), set()
    engine = build(model, tokenizer, SMALLER, DraftModel(model, tokenizer))
    drafter = engine._speculator._drafter
    slabs = drafter._storage._arena.view(-1, drafter._storage.layout.slab_bytes)
    slabs[SINK + 1 :] = 7
    run_rows = drafter._runner.run

    def watched(rows: list[Row]) -> torch.Tensor:
        shapes.add((len(rows), len(rows[0].tokens)))
        return run_rows(rows)

    drafter._runner.run = watched
    engine.warm_up(lambda _: None)
    assert bool((slabs[SINK + 1 :] == 7).all())
    assert shapes >= {(1, 1), (2, 1), (4, 1), (8, 1), (1, 64), (2, 9)}
    slabs[SINK + 1 :] = 0
    text = repeating(0, [64])[0]
    request = submit(engine, "a", text, 12)
    assert tokens(run(engine)["a"]) == uncached(model, text, 12)
    assert request.num_accepted_tokens == request.num_drafted_tokens > 0


def test_a_warm_up_that_is_stopped_runs_no_further(tokenizer: Tokenizer) -> None:
    drafter = ModelDrafter(SMALLER, DraftModel(tiny_model("lf"), tokenizer))
    runs, run_rows = [], drafter._runner.run
    drafter._runner.run = lambda rows: runs.append(run_rows(rows))
    drafter.warm_up(lambda: len(runs) == 3)
    assert len(runs) == 3


def test_what_never_pays_is_tried_by_what_may_be_lost(tokenizer: Tokenizer) -> None:
    """Nothing tells whether a smaller model is right but a draft, which costs time."""
    model = tiny_model("lsf", max_position_embeddings=200)
    config = SMALLER.model_copy(update={"adaptive": True})
    engine = build(model, tokenizer, config, DraftModel(model, tokenizer))
    speculator = engine._speculator
    speculator._times.note_plain = lambda *_: None
    speculator._times.note_drafted = lambda *_: 3.0
    speculator._times.in_steps = lambda *_: 1.0
    speculator._times.wants_plain = lambda _: False
    speculator._times.cost = lambda *_: 3.0
    wanted = uncached(model, [1, 2, 3], 120)
    never = next(token for token in range(300) if token not in wanted)
    speculator._drafter.propose = lambda asks: [[[never]] for _ in asks]
    for n in range(3):
        submit(engine, str(n), [1, 2, 3], 120)
        assert tokens(run(engine)[str(n)]) == wanted
    # Each loses two steps; 2 are there at first, and 2 in a hundred come.
    assert 1 <= speculator.counters.num_drafts <= 1 + 3 * 120 * 0.02 / 2
    drafts = speculator.counters.num_drafts
    speculator._drafter.propose = lambda asks: [
        [wanted[len(ask.request.generated) :][:4]] for ask in asks
    ]
    speculator._allowance.credit = 2.0
    for n in range(3):
        submit(engine, f"right {n}", [1, 2, 3], 120)
        run(engine)
    assert speculator.counters.num_drafts > drafts + 30


class Clock:
    """Stands still but where it is told that time has passed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


def test_catching_up_is_paid_for_and_is_no_step_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many chunks, outputs that end before a guess: nothing is drafted, and it costs."""
    clock, step_s, chunk_s = Clock(), 0.01, 0.025
    monkeypatch.setattr(engine_module, "time", clock)
    monkeypatch.setattr(speculator_module, "time", clock)
    model = tiny_model("lsf", max_position_embeddings=200)
    config = SMALLER.model_copy(update={"adaptive": True, "max_chunk_tokens": 8})
    engine = build(model, tokenizer, config, DraftModel(model, tokenizer))
    speculator, num_chunks = engine._speculator, 0
    run_step, catch_up = engine._worker.run, speculator._drafter._catch_up

    def slow_step(rows: list[Row]) -> torch.Tensor:
        clock.now_s += step_s
        return run_step(rows)

    def slow_catch_up(asks: list[Ask]) -> torch.Tensor:
        nonlocal num_chunks
        num_chunks, clock.now_s = num_chunks + 1, clock.now_s + chunk_s
        return catch_up(asks)

    monkeypatch.setattr(engine._worker, "run", slow_step)
    monkeypatch.setattr(speculator._drafter, "_catch_up", slow_catch_up)
    num_steps, chunk_steps = 0, chunk_s / step_s
    for n in range(60):
        submit(engine, str(n), range(n, n + 90), 6)
        while engine.has_work:
            engine.step()
            num_steps += 1
            lost = num_chunks * chunk_steps
            assert lost <= FIRST_CREDIT + CREDIT_RATE * num_steps + chunk_steps + 1e-9
    assert num_chunks > 2
    assert engine.speculation_counters().num_drafts == 0
    assert speculator._times._of(1).plain.value == pytest.approx(step_s)
