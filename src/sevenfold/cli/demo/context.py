"""Time and memory of one generated token against the length of what came before it."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sevenfold.models import (
    Batch,
    HybridModel,
    KVState,
    LinearState,
    OwnState,
    empty_state,
)

CONTEXTS = tuple(2**power for power in range(8, 16))
REPEATS = 15


@dataclass(frozen=True)
class ContextCost:
    """One decoding step at batch 1 after context_tokens tokens."""

    context_tokens: int
    step_s: float
    cache_bytes: int


def measure_contexts(models: Mapping[str, HybridModel]) -> dict[str, list[ContextCost]]:
    """Measure all models at each context in turn, so that noise meets them alike.

    The cache is filled with random values: a step takes the same time whatever they are.

    Args:
        models: by name, in eval mode.

    Returns:
        For each model its costs, median over REPEATS steps, in the order of CONTEXTS.
    """
    costs: dict[str, list[ContextCost]] = {name: [] for name in models}
    for context in CONTEXTS:
        states = {name: _filled_state(model, context) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(REPEATS + 1):  # the first of each is a warm-up
            for name, model in models.items():
                times[name].append(_step_s(model, context, states[name]))
        for name in models:
            step_s = statistics.median(times[name][1:])
            costs[name].append(ContextCost(context, step_s, _cache_bytes(states[name])))
    return costs


def _filled_state(model: HybridModel, context: int) -> tuple[OwnState, ...]:
    shape = {"device": model.device, "dtype": model.dtype}
    state = empty_state(model.config, 1, context + 1, **shape)
    for layer in state:
        for storage in (layer.k, layer.v) if isinstance(layer, KVState) else (layer.kv,):
            storage.normal_()
    return state


@torch.inference_mode()
def _step_s(model: HybridModel, context: int, state: tuple[OwnState, ...]) -> float:
    began = time.perf_counter()
    batch = Batch.rows(1, 1, past=(context,), device=model.device)
    result = model.hidden(torch.zeros(1, 1, dtype=torch.int64), batch, state)
    model.logits(result.hidden)
    return time.perf_counter() - began


def _cache_bytes(state: tuple[OwnState, ...]) -> int:
    tensors = [
        tensor
        for layer in state
        for tensor in ((layer.kv,) if isinstance(layer, LinearState) else (layer.k, layer.v))
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
