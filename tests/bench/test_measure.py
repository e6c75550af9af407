"""How the benchmark measures, by a clock made by hand, and what it writes down."""

import gc
import json
import mmap
import platform
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from sevenfold.bench import measure, record
from sevenfold.bench.measure import (
    interleaved_median_s,
    matmul_flops_per_s,
    memory_bytes,
    read_bytes_per_s,
    reset_peak_memory,
)


class Clock:
    """Stands still but for what the sides take; remembers who ran."""

    def __init__(self, **durations: list[float]) -> None:
        self.now, self.ran = 100.0, []
        self.left = {name: iter(values) for name, values in durations.items()}

    def perf_counter(self) -> float:
        return self.now

    def side(self, name: str):
        def run() -> None:
            self.ran.append(name)
            self.now += next(self.left[name])

        return run

    def sides(self) -> dict:
        return {name: self.side(name) for name in self.left}


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    def use(**durations: list[float]) -> Clock:
        clock = Clock(**durations)
        monkeypatch.setattr(measure.time, "perf_counter", clock.perf_counter)
        return clock

    return use


def test_sides_take_turns_after_one_call_each(clocked) -> None:
    # Powers of two and sums of few: the clock's differences are exact.
    clock = clocked(a=[64.0, 4.0, 1.0, 2.0], b=[32.0, 0.5, 8.0, 16.0])
    assert interleaved_median_s(clock.sides(), 3) == {"a": 2.0, "b": 8.0}
    assert clock.ran == ["a", "b"] * 4


def test_the_median_of_an_even_number(clocked) -> None:
    clock = clocked(a=[64.0, 1.0, 8.0, 2.0, 4.0])
    assert interleaved_median_s(clock.sides(), 4) == {"a": 3.0}


def test_the_matmul_rate_is_that_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of operands [M, K] and [N, K], later ones in half the time."""
    shapes, took = [], []

    def operand(*shape: int) -> torch.Tensor:
        shapes.append(shape)
        return torch.ones(1, 1)

    def fake(sides: dict, repeats: int) -> dict[str, float]:
        [(name, run)] = sides.items()
        assert (repeats, run().item()) == (3, 1.0)
        took.append(2.0 ** -(2 + len(took)))
        return {name: took[-1]}

    monkeypatch.setattr(torch, "randn", operand)
    monkeypatch.setattr(measure, "interleaved_median_s", fake)
    found = matmul_flops_per_s(repeats=3)
    pairs = zip(shapes[::2], shapes[1::2], took, strict=True)
    assert found == max(2 * M * K * N / seconds for (M, K), (N, _), seconds in pairs)


def test_the_rate_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(sides: dict, repeats: int) -> dict[str, float]:
        [(name, run)] = sides.items()
        assert (repeats, run()) == (5, 1024)  # ones, four bytes each
        return {name: 0.25}

    monkeypatch.setattr(measure, "interleaved_median_s", fake)
    assert read_bytes_per_s(num_bytes=4096, repeats=5) == 4096 / 0.25


def test_memory_is_the_processs_own() -> None:
    gc.collect()  # what an earlier test left must not go away between the readings
    before = memory_bytes("VmRSS")
    with mmap.mmap(-1, 2**26) as held:  # its own pages: malloc may hand out what it kept
        held.write(b"1" * len(held))
        assert memory_bytes("VmRSS") - before > len(held) // 2
    assert memory_bytes("VmHWM") >= memory_bytes("VmRSS")
    with pytest.raises(KeyError, match="/proc/self/status must have VmNope"):
        memory_bytes("VmNope")


def test_the_peak_is_forgotten() -> None:
    held = torch.ones(2**24)  # 64 MB
    del held
    before = memory_bytes("VmHWM")
    in_use = reset_peak_memory()
    assert memory_bytes("VmHWM") - in_use < 2**24 < before
    grown = torch.ones(2**24)
    assert memory_bytes("VmHWM") - in_use > grown.nbytes // 2


def test_a_record_says_what_its_figures_belong_to(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.json"
    cases = [{"case": "a", "ours_s": 0.5}, {"case": "b", "ours_s": 0.25}]
    before = datetime.now(UTC).date()
    record.write_record(path, "sevenfold bench cpu", cases)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    written = json.loads(text)
    assert list(written) == [
        *("command", "date", "device", "threads", "python", "versions", "commit", "cases"),
    ]
    assert written["command"] == "sevenfold bench cpu"
    assert before <= date.fromisoformat(written["date"]) <= datetime.now(UTC).date()
    assert written["device"] == record.cpu_name(Path("/proc/cpuinfo").read_text())
    assert written["threads"] == torch.get_num_threads()
    assert written["python"] == platform.python_version()
    packages = ("sevenfold", "torch", "transformers")
    assert written["versions"] == {name: version(name) for name in packages}
    assert written["cases"] == cases


def test_a_records_commit_is_none_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    record.write_record(tmp_path / "a.json", "x", [])
    assert json.loads((tmp_path / "a.json").read_text())["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    record.write_record(tmp_path / "b.json", "x", [])
    assert json.loads((tmp_path / "b.json").read_text())["commit"] is None


def test_a_records_commit_names_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        record.subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    git("init")
    Path("file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commits = []
    for text in ("one", "two"):
        Path("file").write_text(text)
        record.write_record(tmp_path / "out.json", "x", [])
        commits.append(json.loads((tmp_path / "out.json").read_text())["commit"])
    assert re.fullmatch("[0-9a-f]{7,}", commits[0])
    assert commits[1] == commits[0] + "+"


def test_a_processor_is_named_with_its_generation() -> None:
    first = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    assert record.cpu_name(first + first.replace("17", "18")) == "AMD EPYC, family 25 model 17"
    assert record.cpu_name("model name : Some CPU\n") == "Some CPU"
    assert record.cpu_name("") == (platform.processor() or platform.machine())
