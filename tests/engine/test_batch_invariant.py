"""In batch-invariant mode neither tokens nor the bits of logits depend on company."""

import re

import pytest
import torch
from device_helpers import FakeCapture, new_runner
from engine_helpers import shared_model
from test_engine import prompts, submit
from test_host_tier import plan_of
from tokenizers import Tokenizer

from sevenfold.config import ConfigError
from sevenfold.engine import worker as worker_module
from sevenfold.engine.engine import Engine
from sevenfold.engine.rows import Row
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import RING_TOKENS, PromptLookupConfig
from sevenfold.models import HybridModel

CHUNK_TOKENS = 32
Seen = dict[str, list[torch.Tensor]]


def engine_of(
    model: HybridModel, tokenizer: Tokenizer, *, slabs: int = 64, host_slabs: int = 0, **limits
) -> Engine:
    plan = plan_of(model, slabs, host_slabs)
    config = SchedulerConfig(
        max_request_tokens=plan.longest_context_tokens or 160,
        page_tokens=16,
        min_chunk_tokens=CHUNK_TOKENS,
        batch_invariant=True,
        **{"max_running": 4, "max_step_tokens": 400} | limits,
    )
    return Engine(model, tokenizer, plan, config)


def watch(engine: Engine) -> Seen:
    """The logits from which each request's tokens are chosen."""
    seen: Seen = {}
    choose = engine._choosing.choose

    def watched(requests, logits, *args):
        for request, row in zip(requests, logits, strict=True):
            if request is not None:
                seen.setdefault(request.id, []).append(row.clone())
        return choose(requests, logits, *args)

    engine._choosing.choose = watched
    return seen


def run(engine: Engine, most_steps: int = 2000) -> None:
    for _ in range(most_steps):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"the engine must come to an end in {most_steps} steps")


def sampled(n: int) -> dict:
    """Every other request is sampled."""
    return {"temperature": 0.0} if n % 2 else {"temperature": 0.7, "seed": n, "top_k": 20 * n}


@pytest.mark.parametrize("kind", ["plain", "device"])
@pytest.mark.parametrize("layers", ["ll", "ff", "lsf", "llsl"])
def test_bits_do_not_depend_on_company(
    layers: str, kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "device":
        monkeypatch.setattr(
            worker_module,
            "make_runner",
            lambda model, storage, *_, **__: new_runner(model, storage, FakeCapture(), (4,)),
        )
    model = shared_model(layers)
    # Some go on from what others have cached, and all from lengths that no chunk divides.
    texts = prompts(1, [50, 7, 90, 33, 61, 1], shared=35)
    texts.append([*texts[2], *prompts(2, [9])[0]])
    alone: Seen = {}
    for n, text in enumerate(texts):
        engine = engine_of(model, tokenizer)
        seen = watch(engine)
        submit(engine, str(n), text, 12, **sampled(n + 1))
        run(engine)
        alone |= seen
    slabs = {"ll": 4, "ff": 24, "lsf": 18, "llsl": 18}[layers]
    engine = engine_of(model, tokenizer, slabs=slabs, host_slabs=60, max_step_tokens=260)
    crowd = watch(engine)
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 12, priority=n, **sampled(n + 1))
        engine.step()
    run(engine)
    assert engine.scheduler.num_preemptions == 0
    for name, rows in alone.items():
        assert len(rows) == len(crowd[name])
        for a, b in zip(rows, crowd[name], strict=True):
            assert torch.equal(a, b)
    # Their second visit finds what the first has left, and is computed anew after that.
    hits = engine.counters().hit_tokens
    for n, text in enumerate(texts):
        submit(engine, f"again {n}", text, 12, **sampled(n + 1))
        run(engine)
        for a, b in zip(alone[str(n)], crowd[f"again {n}"], strict=True):
            assert torch.equal(a, b)
    assert engine.counters().hit_tokens > hits
    assert engine.counters().hit_tokens % CHUNK_TOKENS == 0


def test_rows_are_cut_at_multiples_of_a_chunk() -> None:
    row = Row(list(range(75)), 32, 1, [1, 2], {64: 5, 107: 6})
    parts = [(part.past, part.end, part.snapshots) for part in row.parts(32)]
    assert parts == [(32, 64, {64: 5}), (64, 96, {}), (96, 107, {107: 6})]


def test_what_cannot_be_invariant_is_refused(tokenizer: Tokenizer) -> None:
    model = shared_model("lsf")
    limits = {"max_request_tokens": 160, "page_tokens": 16, "batch_invariant": True}
    config = SchedulerConfig(**limits)
    plan = plan_of(model, 64, 0, ring_tokens=RING_TOKENS)
    with pytest.raises(ConfigError, match="speculation must be None with batch_invariant"):
        Engine(model, tokenizer, plan, config, speculation=PromptLookupConfig())
    rule = "state_dtype and snapshot_dtype must be fp32 with batch_invariant"
    for dtypes in ({"snapshot_dtype": "int8"}, {"state_dtype": "fp16"}):
        with pytest.raises(ConfigError, match=rule):
            Engine(model, tokenizer, plan_of(model, 64, 0, **dtypes), config)
    rule = re.escape("decode_batch_sizes must be (256,) or None with batch_invariant, got [1, 2]")
    with pytest.raises(ConfigError, match=rule):
        Engine(model, tokenizer, plan_of(model, 64, 0), config, decode_batch_sizes=(1, 2))
