"""On a GPU in bf16, the bits of a request's logits do not depend on company, nor on what is cached.

Products of other shapes would add up otherwise: here are recorded steps, chunks that end in the
middle of a tile, and prefixes that others have left.
"""

import pytest
import torch
from engine_helpers import MOE
from test_batch_invariant import CHUNK_TOKENS, Seen, run, sampled, watch
from test_device_gpu import gpu_model
from test_engine import prompts, submit
from test_host_tier import plan_of
from tokenizers import Tokenizer

from sevenfold.engine.engine import Engine
from sevenfold.engine.invariant import InvariantRunner
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.models import HybridModel

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]
NEW_TOKENS = 12
MIXES = ["ll", "ff", "lsf", "lllf", "moe"]


def model_of(mix: str) -> HybridModel:
    fields = {"moe": MOE} if mix == "moe" else {}
    return gpu_model("llsf" if mix == "moe" else mix, **fields)


def engine_of(model: HybridModel, tokenizer: Tokenizer) -> Engine:
    plan = plan_of(model, 120, 0, kv_element_bytes=2)
    config = SchedulerConfig(
        max_request_tokens=min(400, plan.longest_context_tokens or 400),
        page_tokens=16,
        min_chunk_tokens=CHUNK_TOKENS,
        batch_invariant=True,
        max_running=6,
        max_step_tokens=600,
    )
    return Engine(model, tokenizer, plan, config)


def texts() -> list[list[int]]:
    """Of lengths that no chunk divides; the last goes on from another, which others share too."""
    found = prompts(1, [50, 7, 190, 33, 61, 1], shared=67)
    return [*found, [*found[2], *prompts(2, [9])[0]]]


def check_same(alone: Seen, found: Seen, prefix: str = "") -> None:
    for name, rows in alone.items():
        for n, (a, b) in enumerate(zip(rows, found[prefix + name], strict=True)):
            assert torch.equal(a, b), f"token {n} of request {prefix + name}"


def seen_alone(model: HybridModel, tokenizer: Tokenizer) -> Seen:
    """Each request's logits, from an engine that has met no other."""
    alone: Seen = {}
    for n, text in enumerate(texts()):
        engine = engine_of(model, tokenizer)
        seen = watch(engine)
        submit(engine, str(n), text, NEW_TOKENS, **sampled(n + 1))
        run(engine)
        alone |= seen
    return alone


@pytest.mark.parametrize("mix", MIXES)
def test_bits_do_not_depend_on_company_or_cache(mix: str, tokenizer: Tokenizer) -> None:
    model = model_of(mix)
    alone = seen_alone(model, tokenizer)
    engine = engine_of(model, tokenizer)
    assert engine._worker._run.__func__ is InvariantRunner.run
    assert engine._worker.ahead is not None  # recorded, in steps of one size
    crowd = watch(engine)
    for n, text in enumerate(texts()):
        submit(engine, str(n), text, NEW_TOKENS, priority=n, **sampled(n + 1))
        engine.step()
    run(engine)
    check_same(alone, crowd)
    # A second visit, in another order and all at once, finds what the first has left.
    hits = engine.counters().hit_tokens
    for n, text in reversed(list(enumerate(texts()))):
        submit(engine, f"again {n}", text, NEW_TOKENS, **sampled(n + 1))
    run(engine)
    check_same(alone, crowd, "again ")
    assert engine.counters().hit_tokens >= hits + CHUNK_TOKENS * len(texts()) // 2


def test_without_the_mode_bits_depend_on_company(tokenizer: Tokenizer) -> None:
    """So that the test above has something to find."""
    model = model_of("lllf")
    alone = seen_alone(model, tokenizer)
    plan = plan_of(model, 120, 0, kv_element_bytes=2)
    config = SchedulerConfig(
        max_request_tokens=400, page_tokens=16, min_chunk_tokens=CHUNK_TOKENS, max_running=6,
        max_step_tokens=600,
    )  # fmt: skip
    engine = Engine(model, tokenizer, plan, config)
    crowd = watch(engine)
    for n, text in enumerate(texts()):
        submit(engine, str(n), text, NEW_TOKENS, **sampled(n + 1))
    run(engine)
    pairs = [(a, b) for name in alone for a, b in zip(alone[name], crowd[name], strict=True)]
    assert not all(torch.equal(a, b) for a, b in pairs)
