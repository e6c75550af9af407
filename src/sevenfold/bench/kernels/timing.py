"""Medians of device time, and the two ceilings of the device."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BUDGET_S = 0.15  # of timed runs
WARM_UP_S = 0.05
MAX_RUNS = 100
MIN_RUNS = 3
_QUEUED = 10  # calls of another library between two waits
_FLUSH_BYTES = 2**28  # four times an H200's L2
_HOST_RUNS = 5
_HEAD_START = 1.5  # the device is kept busy for so many times the host's share of a run

_COPY_BYTES = 2**31
_MATMUL_SIDE = 8192


def timed_once(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Run once between two synchronisations; seconds and what it returned."""
    _synchronize(device)
    began = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - began, result


class Timing(NamedTuple):
    """Median seconds of a run, the runs that it was taken from, and what a call costs the host.

    host_s is the median time until a call has queued its work; None where that is not seen.
    """

    median_s: float
    runs: int
    host_s: float | None


def time_run(run: Callable[[], Any], device: torch.device) -> Timing:
    """Time a function on torch's stream, with cold caches before each run.

    The time is the device's: before each run it is kept busy until the host has queued the whole
    run. What the host takes is told beside it.
    """
    runs = num_runs(_warm_up(run, device))
    if device.type != "cuda":
        times = [timed_once(run, device)[0] for _ in range(runs)]
        return Timing(statistics.median(times), runs, None)
    host_s = _host_s(run)
    return Timing(statistics.median(_event_times(run, runs, host_s)), runs, host_s)


def median_s(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median of time_run."""
    return time_run(run, device).median_s


def queued_median_s(run: Callable[[], Any], wait: Callable[[Any], Any]) -> tuple[float, int]:
    """Time a function of another library, whose stream torch's events do not see.

    Calls are queued by tens, so that the host's share of a call hides behind the device's.

    Args:
        run: one call.
        wait: waits until what run returned is computed.

    Returns:
        The median of a call over the batches in seconds and the number of calls.
    """

    def batch(calls: int) -> float:
        began = time.perf_counter()
        result = None
        for _ in range(calls):
            result = run()
        wait(result)
        return (time.perf_counter() - began) / calls

    took = batch(1)
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP_S:
        took = batch(_QUEUED)
    calls = _QUEUED if took < BUDGET_S / _QUEUED else 1
    batches = max(MIN_RUNS, num_runs(took) // calls)
    return statistics.median(batch(calls) for _ in range(batches)), batches * calls


def num_runs(took_s: float) -> int:
    """Return how many runs of a length fill the budget: at least 3, at most 100."""
    return max(MIN_RUNS, min(MAX_RUNS, int(BUDGET_S / max(took_s, 1e-9))))


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure what the device can do.

    Returns:
        copy_bytes_per_s, read and written, of a copy of 2 GiB; matmul_flops_per_s of a bf16
        product of 8192^3 on random numbers.
    """
    source = torch.randint(0, 100, (_COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = median_s(lambda: target.copy_(source), device)
    x, y = (
        torch.randn(_MATMUL_SIDE, _MATMUL_SIDE, dtype=torch.bfloat16, device=device)
        for _ in range(2)
    )
    product = median_s(lambda: x @ y, device)
    return {
        "copy_bytes_per_s": 2 * _COPY_BYTES / copy,
        "matmul_flops_per_s": 2 * _MATMUL_SIDE**3 / product,
    }


def _warm_up(run: Callable[[], Any], device: torch.device) -> float:
    """Run until clocks have risen; the seconds of the last run."""
    began = time.perf_counter()
    while True:
        took, _ = timed_once(run, device)
        if time.perf_counter() - began > WARM_UP_S:
            return took


def _host_s(run: Callable[[], Any]) -> float:
    """Until a call returns, on a device without other work."""
    times = []
    for _ in range(_HOST_RUNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(times)


def _event_times(run: Callable[[], Any], runs: int, host_s: float) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    flush.zero_()
    flush_s, _ = timed_once(flush.zero_, torch.device("cuda"))
    flushes = 1 + math.ceil(_HEAD_START * host_s / flush_s)
    pairs = []
    for _ in range(runs):
        for _ in range(flushes):
            flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        pairs.append((began, ended))
    torch.cuda.synchronize()
    return [began.elapsed_time(ended) / 1000 for began, ended in pairs]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
