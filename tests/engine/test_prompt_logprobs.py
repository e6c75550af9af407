"""A prompt's log probabilities are read in its own prefill: by chunks, in planned memory."""

import pytest
import torch
from engine_helpers import tiny_model
from test_engine import build, prompts, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine.events import TokenEvent
from sevenfold.models import HybridModel


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return tiny_model("lsf", max_position_embeddings=200)


def scored(events: list[TokenEvent]) -> list[float]:
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * (
        len(events) - 1
    )
    return [one.chosen for one in events[0].prompt_logprobs or ()]


@torch.inference_mode()
def alone(model: HybridModel, text: list[int]) -> list[float]:
    z = model(torch.tensor([text]))[0, :-1].log_softmax(-1)
    return z.gather(-1, torch.tensor(text[1:])[:, None])[:, 0].tolist()


def near(found: list[float], wanted: list[float]) -> bool:
    spread = max(map(abs, wanted)) * torch.finfo(torch.float32).eps
    return all(abs(a - b) <= 256 * spread for a, b in zip(found, wanted, strict=True))


def test_chunks_company_and_a_cached_prefix(model: HybridModel, tokenizer: Tokenizer) -> None:
    texts = prompts(1, [61, 1, 40], shared=20)
    engine = build(model, tokenizer, max_step_tokens=60, max_prefills=2, max_running=4)
    for turn in range(2):
        found = [submit(engine, f"{turn} {n}", text, 3, prompt_logprobs=1)
                 for n, text in enumerate(texts)]  # fmt: skip
        events = run(engine)
        for n, text in enumerate(texts):
            assert near(scored(events[f"{turn} {n}"]), alone(model, text))
        # What is cached is of no use to them: it holds no logits.
        assert [request.num_cached_tokens for request in found] == [0, 0, 0]
    other = submit(engine, "other", texts[0], 3)
    assert tokens(run(engine)["other"]) == tokens(events["1 0"])
    assert other.num_cached_tokens >= 64


def test_a_prompt_that_is_preempted_is_scored_once(
    model: HybridModel, tokenizer: Tokenizer
) -> None:
    texts = prompts(2, [90, 80, 70])
    engine = build(
        model,
        tokenizer,
        slabs=14,
        max_step_tokens=68,
        max_prefills=3,
        max_running=4,
        headroom_tokens=0,
    )
    events: dict[str, list[TokenEvent]] = {}
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 40, priority=n, prompt_logprobs=0)
        for _ in range(2):
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
    for name, more in run(engine).items():
        events.setdefault(name, []).extend(more)
    assert engine.scheduler.num_preemptions > 0
    for n, text in enumerate(texts):
        assert near(scored(events[str(n)]), alone(model, text))
