"""How a benchmark measures: sides in turn, medians, peaks in a process of their own."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from sevenfold.ops import linear


def interleaved_median_s(
    sides: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Time all sides in turn, so that noise meets them alike.

    Args:
        sides: what to call, by name; each is called once before the timing.
        repeats: timed calls of each.

    Returns:
        The median of each side, seconds.
    """
    timed = {name: partial(elapsed_s, run) for name, run in sides.items()}
    return interleaved_medians(timed, repeats)


def interleaved_medians(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Return the median of what each side measures, called as by interleaved_median_s."""
    for measure in sides.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def elapsed_s(run: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# Rows, inputs and outputs of the products whose best rate stands for the machine's.
_MATMULS = ((2048, 2048, 2048), (4096, 256, 768), (2048, 512, 256))


def matmul_flops_per_s(repeats: int = 15) -> float:
    """Measure the best fp32 matmul rate of this CPU through the product that linear takes."""
    rates = []
    for M, K, N in _MATMULS:
        x, weight = torch.randn(M, K), torch.randn(N, K)
        took = interleaved_median_s({"matmul": partial(linear, x, weight)}, repeats)["matmul"]
        rates.append(2 * M * K * N / took)
    return max(rates)


def read_bytes_per_s(num_bytes: int = 2**28, repeats: int = 9) -> float:
    """Measure how fast this CPU reads memory, by a sum over a buffer."""
    x = torch.ones(num_bytes // 4)
    return num_bytes / interleaved_median_s({"read": x.sum}, repeats)["read"]


def reset_peak_memory() -> int:
    """Give freed memory back to the system, forget the peak, and return what is in use (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return memory_bytes("VmRSS")


def memory_bytes(field: str) -> int:
    """Return a field of this process's memory, such as VmRSS or its peak VmHWM (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(f"/proc/self/status must have {field}")
