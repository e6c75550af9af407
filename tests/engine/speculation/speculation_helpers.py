"""Engines that speculate, and texts that repeat themselves."""

import random
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import Tokenizer

from sevenfold.engine import SamplingParams
from sevenfold.engine.engine import Engine
from sevenfold.engine.events import TokenEvent
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import (
    RING_TOKENS,
    DraftModel,
    DraftModelConfig,
    PromptLookupConfig,
    SpeculationConfig,
)
from sevenfold.models import HybridModel

PAGE_TOKENS, CONTEXT_TOKENS = 16, 160
# Whatever it costs: what is tested is what comes out.
CHAIN = PromptLookupConfig(draft_tokens=5, min_match_tokens=1, adaptive=False)
TREE = PromptLookupConfig(draft_tokens=7, branches=3, min_match_tokens=1, adaptive=False)
SMALLER = DraftModelConfig(
    draft_tokens=4, adaptive=False, memory_bytes=1 << 21, context_tokens=CONTEXT_TOKENS
)


def build(
    model: HybridModel,
    tokenizer: Tokenizer,
    speculation: SpeculationConfig | None = None,
    draft: DraftModel | None = None,
    *,
    slabs: int = 64,
    state_dtype: str = "fp32",
    **limits: float,
) -> Engine:
    """An engine of so many slabs."""
    size = {
        "context_tokens": CONTEXT_TOKENS,
        "page_tokens": PAGE_TOKENS,
        "kv_element_bytes": 4,
        "ring_tokens": 0 if speculation is None else RING_TOKENS,
        "state_dtype": state_dtype,
    }
    slab = plan_memory(model.config, budget_bytes=1 << 30, **size).layout.slab_bytes
    plan = plan_memory(model.config, budget_bytes=slabs * slab, **size)
    config = SchedulerConfig(
        max_request_tokens=plan.longest_context_tokens or CONTEXT_TOKENS,
        page_tokens=PAGE_TOKENS,
        **{"min_chunk_tokens": 16, "max_step_tokens": 400} | limits,
    )
    return Engine(model, tokenizer, plan, config, speculation=speculation, draft=draft)


def submit(engine: Engine, name: str, prompt: Sequence[int], num_tokens: int, **options) -> Request:
    """Ask for greedy tokens, but for what the options say."""
    fields = {k: options.pop(k) for k in ("salt", "priority", "marks") if k in options}
    constraint = options.pop("constraint", None)
    request = Request(name, tuple(prompt), num_tokens, **fields)
    params = {"temperature": 0.0} | options
    engine.submit(request, SamplingParams(max_tokens=num_tokens, **params), constraint)
    return request


def run(engine: Engine, most_steps: int = 2000) -> dict[str, list[TokenEvent]]:
    """All events of all requests, to the end."""
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            return events
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError(f"the engine must come to an end in {most_steps} steps")


def tokens(events: list[TokenEvent]) -> list[int]:
    """What came out."""
    return [event.token_id for event in events if event.token_id is not None]


def repeating(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of so many tokens that say a few phrases again and again."""
    draw = random.Random(seed)
    phrases = [[draw.randrange(300) for _ in range(draw.randrange(2, 7))] for _ in range(4)]
    prompts = []
    for length in lengths:
        prompt = [token for _ in range(length) for token in draw.choice(phrases)]
        prompts.append(prompt[:length])
    return prompts


def is_idle(engine: Engine, before: object) -> bool:
    """Whether all memory is back once what is cached is given up."""
    engine.cache.clear()
    return engine.cache.usage() == before and not engine.has_work


def rising(values: Sequence[int]) -> bool:
    """Whether no value is less than the one before it."""
    return all(a <= b for a, b in pairwise(values))
