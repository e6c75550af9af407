"""Chunks of prompts that go block by block through an engine, and a mode that keeps off it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from device_helpers import FakeCapture, Places, new_runner, new_storage, prompt
from engine_helpers import tiny_model, uncached
from test_engine import build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine import runners
from sevenfold.engine import worker as worker_module
from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.rows import Row
from sevenfold.models.mixers import softmax
from sevenfold.ops.attention import chunks_cudnn
from sevenfold.ops.attention.chunks_plan import Cut

Lengths = list[tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Lengths:
    """Past and new tokens of what goes by blocks, which is every chunk, in blocks of a few."""
    found: Lengths = []
    attend: Callable = softmax.attention_chunks

    def watched(*tokens, lengths, past, scale):
        found.append((past, lengths))
        return attend(*tokens, lengths=lengths, past=past, scale=scale)

    monkeypatch.setattr(chunks_cudnn, "CUT", Cut(unit_tokens=4, most_tokens=16))
    monkeypatch.setattr(softmax, "suits_chunks", lambda *_: True)
    monkeypatch.setattr(softmax, "attention_chunks", watched)
    return found


@pytest.mark.parametrize("mix", ["ff", "lfs"])
def test_the_engine_gives_the_same_tokens(
    mix: str, seen: Lengths, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        worker_module,
        "make_runner",
        lambda model, storage, *_, **__: new_runner(model, storage, FakeCapture(), (1, 2, 4)),
    )
    model = tiny_model(mix, max_position_embeddings=200)
    texts = prompts(0, [1, 70, 3, 17, 90])
    limits = {"max_running": 5, "max_prefills": 2, "min_chunk_tokens": 16}
    engine = build(model, tokenizer, max_step_tokens=40, **limits)
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 7)
    events = run(engine)
    found = [tokens(events[str(n)]) for n in range(len(texts))]
    assert found == [uncached(model, text, 7) for text in texts]
    # Prompts of one step, and chunks after others; never a decoding step or a window.
    assert {max(past) > 0 for past, _ in seen} == {True, False}
    assert all(max(lengths) > 1 for _, lengths in seen)


@pytest.mark.parametrize("cuts_change_bits", [True, False])
def test_a_runner_keeps_off_it_where_cuts_may_not_change_bits(
    cuts_change_bits: bool, seen: Lengths
) -> None:
    model = tiny_model("ff")  # of the last layer a prompt's last token is asked for alone
    storage = new_storage(model)
    runner = DeviceRunner(model, storage, page_tokens=16, cuts_change_bits=cuts_change_bits)
    where = (None, Places(storage).pages(0), {})
    runner.run([Row(prompt(9, 1), 0, *where)])
    runner.run([Row(prompt(11, 2), 9, *where)])
    runner.run([Row([5], 20, *where)])
    assert seen == ([((0,), (9,)), ((9,), (11,))] if cuts_change_bits else [])


@pytest.mark.parametrize("invariant", [True, False])
def test_batch_invariant_engines_do_not_let_cuts_change_bits(
    invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "DeviceRunner", lambda *_, **how: how["cuts_change_bits"])
    monkeypatch.setattr(runners, "is_recordable", lambda _: False)
    model, storage = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(is_exact=True)
    made = runners.make_runner(model, storage, (16, 4), None, invariant=invariant)
    assert made is not invariant
