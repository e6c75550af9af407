"""Memory and limits for serving a model where it lies, from a budget."""

import os

import torch

from sevenfold.config import ConfigError
from sevenfold.engine.device import graph_bytes
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.precision import SnapshotDtype, StateDtype
from sevenfold.engine.scheduler import SchedulerConfig
from sevenfold.engine.speculation import RING_TOKENS, DraftModelConfig, SpeculationConfig
from sevenfold.models import HybridModel

PAGE_TOKENS = 64
# Of what is free once the weights are loaded; activations take the rest.
_FREE_SHARE = {"cuda": 0.8, "cpu": 0.25}
_MOST_CPU_BYTES = 4 << 30
_MOST_ROWS = SchedulerConfig.model_fields["max_running"].default
# What a step computes on a CPU: enough to fill its products, and short enough to stream.
_CPU_LIMITS = {"max_step_tokens": 2048, "max_running": 64, "min_chunk_tokens": 128}


def default_budget_bytes(model: HybridModel, *, draft_tokens: int = 0, num_ranks: int = 1) -> int:
    """Return the bytes that states, pages and snapshots may take beside a model's weights.

    On a GPU it leaves room for recorded steps, with so many guesses a row where there are any;
    ranks on a CPU share its memory.
    """
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        rows = _MOST_ROWS * (1 + draft_tokens)
        graphs = graph_bytes(model.config, rows, element_bytes=model.dtype.itemsize)
        return int(_FREE_SHARE["cuda"] * free) - graphs
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_MOST_CPU_BYTES, int(_FREE_SHARE["cpu"] * free)) // num_ranks


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
    if budget is None:
        drafts = 0 if speculation is None else speculation.draft_tokens
        budget = default_budget_bytes(model, draft_tokens=drafts, num_ranks=num_ranks)
    if isinstance(speculation, DraftModelConfig):
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
    limits = _CPU_LIMITS if model.device.type == "cpu" else {}
    config = SchedulerConfig(
        max_request_tokens=most,
        page_tokens=PAGE_TOKENS,
        batch_invariant=batch_invariant,
        **limits,
    )
    return plan, config
