"""Memory and limits for serving a model where it lies, from a budget."""

import os

import torch

from sevenfold.config import ConfigError
from sevenfold.engine.device import (
    chunk_token_bytes,
    gathered_bytes,
    gathered_logits_bytes,
    graph_bytes,
    prefill_sizes,
)
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.precision import SnapshotDtype, StateDtype
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import RING_TOKENS, DraftModelConfig, SpeculationConfig
from sevenfold.models import HybridModel, ModelConfig
from sevenfold.models.accounting import prefill_flops

PAGE_TOKENS = 64
# Of what is free once the weights are loaded; activations take the rest.
_FREE_SHARE = {"cuda": 0.8, "cpu": 0.25}
_MOST_CPU_BYTES = 4 << 30
_MOST_ROWS = SchedulerConfig.model_fields["max_running"].default
# What a step computes on a CPU: enough to fill its products, and short enough to stream.
_CPU_LIMITS = {"max_step_tokens": 2048, "max_running": 64, "min_chunk_tokens": 128}
# A lone chunk on a GPU: launching its kernels takes the host as long whatever its length, so it is
# longer, up to a length that pays no more, a time that newcomers may wait (0.2 s at 400 TFLOP/s),
# and half of the memory that the budget leaves.
_MOST_LONE_TOKENS = 32_768
_MOST_LONE_FLOPS = 8e13
_LONE_MEMORY_SHARE = 0.5


def default_budget_bytes(model: HybridModel, *, draft_tokens: int = 0, num_ranks: int = 1) -> int:
    """Return the bytes that states, pages and snapshots may take beside a model's weights.

    On a GPU it leaves room for recorded runs, with so many guesses a row where there are any;
    ranks on a CPU share its memory.
    """
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        return int(_FREE_SHARE["cuda"] * free) - _recorded_bytes(model, draft_tokens)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_MOST_CPU_BYTES, int(_FREE_SHARE["cpu"] * free)) // num_ranks


def lone_chunk_tokens(config: ModelConfig, free_bytes: int, *, element_bytes: int = 2) -> int:
    """Return how much of a prompt a GPU computes at once where nothing else decodes.

    Twice max_step_tokens, four times and so on: see SchedulerConfig.

    Args:
        config: the model.
        free_bytes: for activations.
        element_bytes: of the model's dtype.
    """
    tokens = SchedulerConfig.model_fields["max_step_tokens"].default
    # The other prompts' share of a step lies beside it.
    left = max(0, free_bytes - gathered_bytes(config, element_bytes=element_bytes))
    most = _LONE_MEMORY_SHARE * left / chunk_token_bytes(config, element_bytes=element_bytes)
    while 2 * tokens <= min(_MOST_LONE_TOKENS, most):
        if prefill_flops(config, 2 * tokens) > _MOST_LONE_FLOPS:
            break
        tokens *= 2
    return tokens


def size_engine(
    model: HybridModel,
    *,
    budget_bytes: int | None = None,
    context_tokens: int | None = None,
    state_dtype: StateDtype = "fp32",
    snapshot_dtype: SnapshotDtype = "fp32",
    speculation: SpeculationConfig | None = None,
    num_ranks: int = 1,
    host_bytes: int = 0,
    batch_invariant: bool = False,
) -> tuple[MemoryPlan, SchedulerConfig]:
    """Cut a budget for a model and set the scheduler's limits to it.

    Args:
        model: on its device.
        budget_bytes: for states, pages and snapshots; None takes default_budget_bytes.
        context_tokens: what one request must be able to reach; None takes what the model allows, or
            less if the budget holds less.
        state_dtype: of the states of running requests.
        snapshot_dtype: of cached states; "auto" keeps more bits of heads that remember longer.
        speculation: what the engine will speculate by: its drafts, and the memory of a draft model,
            come out of the budget.
        num_ranks: processes of this machine that hold parts of the model.
        host_bytes: of the host's memory, for cached prefixes that have to make room; 0 keeps none.
        batch_invariant: whether a request's bits must not depend on others (SchedulerConfig).

    Returns:
        The plan and the limits.

    Raises:
        ConfigError: the budget cannot hold one request of context_tokens beside a draft model's
            memory, they exceed what the model allows, or state_dtype would erase a head's horizon.
    """
    limit = model.config.max_position_embeddings
    if context_tokens is not None and not 1 <= context_tokens <= limit:
        raise ConfigError(
            f"context_tokens must lie in 1 to max_position_embeddings = {limit}, got "
            f"{context_tokens}"
        )
    budget = budget_bytes
    drafts = 0 if speculation is None else speculation.draft_tokens
    if budget is None:
        budget = default_budget_bytes(model, draft_tokens=drafts, num_ranks=num_ranks)
    if isinstance(speculation, DraftModelConfig):
        if speculation.memory_bytes >= budget:
            raise ConfigError(
                "the draft model's memory must leave some of the budget to the model, got "
                f"{speculation.memory_bytes:,} of {budget:,} bytes"
            )
        budget -= speculation.memory_bytes
    plan = plan_memory(
        model.config,
        budget_bytes=budget,
        context_tokens=context_tokens or 1,
        page_tokens=PAGE_TOKENS,
        state_dtype=state_dtype,
        snapshot_dtype=snapshot_dtype,
        kv_element_bytes=model.dtype.itemsize,
        ring_tokens=0 if speculation is None else RING_TOKENS,
        host_bytes=host_bytes,
    )
    longest = plan.longest_context_tokens
    most = context_tokens or (limit if longest is None else min(limit, longest))
    limits = _CPU_LIMITS
    if model.device.type == "cuda":
        taken = budget + _recorded_bytes(model, drafts)
        limits = {"lone_chunk_tokens": _lone_chunk_tokens(model, taken)}
    config = SchedulerConfig(
        max_request_tokens=most,
        page_tokens=PAGE_TOKENS,
        batch_invariant=batch_invariant,
        **limits,
    )
    return plan, config


def _recorded_bytes(model: HybridModel, draft_tokens: int) -> int:
    """What recorded runs take of a GPU, whether there will be any or not."""
    rows, tokens = _MOST_ROWS * (1 + draft_tokens), max(prefill_sizes(model.config), default=0)
    taken = graph_bytes(model.config, rows, tokens, element_bytes=model.dtype.itemsize)
    num_ranks = model.config.vocab_size // len(model.lm_head.weight)
    return taken + gathered_logits_bytes(model.config, rows, num_ranks)


def _lone_chunk_tokens(model: HybridModel, taken_bytes: int) -> int:
    free, _ = torch.cuda.mem_get_info(model.device)
    left = max(0, free - taken_bytes)
    return lone_chunk_tokens(model.config, left, element_bytes=model.dtype.itemsize)
