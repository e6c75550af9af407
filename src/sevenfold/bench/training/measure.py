"""One case in the process that it has for itself: check, steps, median, peak memory."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sevenfold.bench.kernels.timing import ceilings
from sevenfold.bench.measure import matmul_flops_per_s, memory_bytes, reset_peak_memory
from sevenfold.bench.peer import load_peer, peer_loss
from sevenfold.bench.training.agreement import check_ours, check_peer, exact_values
from sevenfold.bench.training.cases import OURS, Case
from sevenfold.bench.training.inputs import RandomRows, run_config
from sevenfold.models import HybridModel, init_weights
from sevenfold.models.accounting import count_parameters, training_flops
from sevenfold.models.training_memory import longest_tokens, training_memory
from sevenfold.optim import build_optimizer
from sevenfold.train.loop import StepOutcome, Trainer, train_steps
from sevenfold.train.progress import Progress
from sevenfold.train.transform import transform_model

WARM_UP_STEPS = 2
_FILLED = 0.95  # of a GPU's free memory: the rest is the allocator's
BUDGET_S = 25.0  # of steps, warm-up included: the median of what was done until then
MAX_STEPS = 10

Row = dict[str, Any]


def open_device(device: str) -> Callable[[Case], Row]:
    """Return what measures a case on a device; called in a process of its own."""
    return lambda case: measure(case, torch.device(device))


def measure(case: Case, device: torch.device) -> Row:
    """Measure one case.

    Args:
        case: what to train.
        device: where.

    Returns:
        Step time, tokens a second, shares of the measured rate of products, peak memory.

    Raises:
        AssertionError: the side is wrong.
        UnsupportedError: transformers is not installed.
    """
    rate = _matmul_rate(device)
    if case.group == "longest":
        _let_segments_grow(device)
        case = replace(case, tokens=case.tokens if device.type == "cpu" else _longest(case))
    errors, steps = (_ours if case.side == OURS else _peer)(case, device)
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = reset_peak_memory()
    times = steps()
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    peak = memory_bytes("VmHWM") - before if after is None else after
    return {
        "case": case.name,
        "tokens": case.tokens,
        **_figures(case, statistics.median(times), rate),
        **errors,
        "timed_steps": len(times),
        "peak_bytes": peak,
        "predicted_bytes": _predicted(case) if after is not None and case.side == OURS else None,
    }


def _let_segments_grow(device: torch.device) -> None:
    """Let the allocator join idle memory: else a fifth of it lay idle when a long row failed."""
    if device.type == "cuda":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _longest(case: Case) -> int:
    """The longest row that is predicted to fit in the part of this GPU that a run may fill."""
    return longest_tokens(case.config, int(_FILLED * torch.cuda.mem_get_info()[0]))


def _predicted(case: Case) -> int:
    every = 1 if case.recompute else None
    return training_memory(case.config, case.rows * case.tokens, recompute_every=every).total


def _figures(case: Case, step_s: float, rate: float) -> Row:
    config, tokens = case.config, case.rows * case.tokens
    active = count_parameters(config).active + config.vocab_size * config.hidden_size
    flops_per_s = training_flops(config, [case.tokens] * case.rows) / step_s
    return {
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "floor_tokens_per_s": rate / (6 * active),
        "model_flops_per_s": flops_per_s,
        "share_of_matmul": flops_per_s / rate,
        "matmul_flops_per_s": rate,
    }


def _matmul_rate(device: torch.device) -> float:
    if device.type == "cpu":
        return matmul_flops_per_s()
    rate = ceilings(device)["matmul_flops_per_s"]
    torch.cuda.empty_cache()
    return rate


def build_ours(case: Case, device: torch.device) -> tuple[Trainer, dict[str, float]]:
    """Return the trainer of a case, its model checked, and the errors found."""
    config = run_config(case, device)
    with device:
        model = init_weights(HybridModel(case.config), seed=0, drawn_on=device).train()
    exact = exact_values(model)
    transform_model(model, config)
    errors = check_ours(model, exact, config.precision.autocast)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    rows = RandomRows(case.config.vocab_size, case.tokens)
    return Trainer(config, model, optimizer, rows), errors


def _ours(case: Case, device: torch.device) -> tuple[dict[str, float], Callable[[], list[float]]]:
    trainer, errors = build_ours(case, device)

    def steps() -> list[float]:
        times: list[float] = []
        began = time.perf_counter()

        def after(outcome: StepOutcome) -> None:
            assert outcome.fault is None, f"a timed step must be finite, got {outcome.fault}"
            times.append(outcome.time_s)

        def stop() -> bool:
            return _enough(case, times, time.perf_counter() - began)

        train_steps(trainer, Progress(), after_step=after, stop=stop)
        return _timed(times)

    return errors, steps


def _peer(case: Case, device: torch.device) -> tuple[dict[str, float], Callable[[], list[float]]]:
    with device:
        model = init_weights(HybridModel(case.config), seed=0, drawn_on=device).train()
    exact = exact_values(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peer = load_peer(model.to(dtype), device=device, dtype=dtype)
    del model
    _free(device)
    errors = check_peer(peer, case.config.vocab_size, exact)
    peer.train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, fused=True)
    rows = RandomRows(case.config.vocab_size, case.tokens)

    def step(number: int) -> None:
        ids = _ids(rows, case, number).to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = peer_loss(peer, ids, ids)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss).item(), "a timed step must be finite"

    def steps() -> list[float]:
        times: list[float] = []
        began = time.perf_counter()
        while not _enough(case, times, time.perf_counter() - began):
            started = time.perf_counter()
            step(len(times))
            times.append(time.perf_counter() - started)
        return _timed(times)

    return errors, steps


def _ids(rows: RandomRows, case: Case, step: int) -> Tensor:
    first = step * case.rows
    samples = [rows.sample(first + row).input_ids for row in range(case.rows)]
    return torch.stack([torch.from_numpy(ids) for ids in samples])


def _enough(case: Case, times: list[float], elapsed_s: float) -> bool:
    """Whether to stop: all steps done, or no time for one more.

    The first step compiles kernels, so there are two, but for the longest row, which only has to
    fit.
    """
    if len(times) < (1 if case.group == "longest" else 2):
        return False
    return len(times) >= MAX_STEPS or elapsed_s + times[-1] > BUDGET_S


def _timed(times: list[float]) -> list[float]:
    """Without the warm-up, where there was time for more than that."""
    return times[WARM_UP_STEPS:] or times[-1:]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
