"""The kernel benchmark's medians, by a clock made by hand, and the arithmetic of its ceilings."""

import pytest
import torch

from sevenfold.bench.kernels import timing
from sevenfold.bench.kernels.timing import ceilings, num_runs, queued_median_s, time_run

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what the calls take: the next of a list, the last one for ever."""

    def __init__(self, *durations: float) -> None:
        self.now, self.durations, self.calls, self.waits = 64.0, list(durations), 0, 0

    def perf_counter(self) -> float:
        return self.now

    def run(self) -> int:
        self.calls += 1
        self.now += self.durations.pop(0) if len(self.durations) > 1 else self.durations[0]
        return self.calls

    def wait(self, result: int) -> None:
        assert result == self.calls  # of the last call
        self.waits += 1


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch):
    def use(*durations: float) -> Clock:
        clock = Clock(*durations)
        monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
        return clock

    return use


@pytest.mark.parametrize(
    ("took_s", "runs"), [(10.0, 3), (0.05, 3), (0.015, 10), (1e-6, 100), (0.0, 100)]
)
def test_runs_fill_the_budget(took_s: float, runs: int) -> None:
    assert num_runs(took_s) == runs


def test_the_first_run_warms_up_and_does_not_count(clocked) -> None:
    clock = clocked(8.0, 4.0, 1.0, 2.0)
    assert time_run(clock.run, CPU) == (2.0, 3, None)
    assert clock.calls == 4


def test_short_runs_warm_up_until_clocks_have_risen(clocked) -> None:
    clock = clocked(2.0**-6)
    assert time_run(clock.run, CPU) == (2.0**-6, 9, None)
    assert clock.calls == 4 + 9  # 4/64 s is the first multiple above 0.05


def test_calls_are_queued_between_waits(clocked) -> None:
    clock = clocked(2.0**-7)
    assert queued_median_s(clock.run, clock.wait) == (2.0**-7, 30)
    # One call alone, ten to warm up, three times ten.
    assert (clock.calls, clock.waits) == (1 + 10 + 30, 1 + 1 + 3)


def test_long_calls_are_not_queued(clocked) -> None:
    clock = clocked(2.0**-5)
    assert queued_median_s(clock.run, clock.wait) == (2.0**-5, 4)
    assert (clock.calls, clock.waits) == (1 + 10 + 4, 1 + 1 + 4)


def test_ceilings_count_bytes_both_ways_and_two_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_COPY_BYTES", 1024)
    monkeypatch.setattr(timing, "_MATMUL_SIDE", 16)
    results = []

    def fake(run, device: torch.device) -> float:
        results.append(run())
        return 0.25

    monkeypatch.setattr(timing, "median_s", fake)
    assert ceilings(CPU) == {
        "copy_bytes_per_s": 4 * 2 * 1024,
        "matmul_flops_per_s": 4 * 2 * 16**3,
    }
    copied, product = results
    assert (copied.numel(), product.shape) == (1024, (16, 16))
    assert len(copied.unique()) > 1
