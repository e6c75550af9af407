"""How a benchmark measures: sides in turn, medians, peaks in a process of their own."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


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
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_flops_per_s(size: int = 2048, repeats: int = 9) -> float:
    """Measure the fp32 matmul rate of this CPU through the product that linear takes."""
    from sevenfold.ops import linear

    x, weight = torch.randn(size, size), torch.randn(size, size)
    took = interleaved_median_s({"matmul": lambda: linear(x, weight)}, repeats)["matmul"]
    return 2 * size**3 / took


def read_bytes_per_s(num_bytes: int = 2**28, repeats: int = 9) -> float:
    """Measure how fast this CPU reads memory, by a sum over a buffer."""
    x = torch.ones(num_bytes // 4)
    return num_bytes / interleaved_median_s({"read": x.sum}, repeats)["read"]


def memory_bytes(field: str) -> int:
    """Return a field of this process's memory, such as VmRSS or its peak VmHWM (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(f"/proc/self/status must have {field}")
