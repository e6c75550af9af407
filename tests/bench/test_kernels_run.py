"""The whole kernel benchmark with fakes: who runs what, floors, the record, the command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sevenfold.bench.kernels import command, run
from sevenfold.bench.kernels.apart import Failure
from sevenfold.bench.kernels.cases import Case, Task, cases_of
from sevenfold.bench.kernels.command import Request
from sevenfold.bench.kernels.record import build_record, default_path, slopes_of, write_json
from sevenfold.bench.kernels.run import run_sides
from sevenfold.bench.kernels.sides import side_named
from sevenfold.cli.bench import bench_app
from sevenfold.config import SevenfoldError, UnsupportedError
from sevenfold.ops import head_slopes

FORWARD, MEMORY = (
    next(case for case in cases_of([group]) if group in case.groups)
    for group in ("forward", "memory")
)
OURS = side_named("sevenfold")
# Any module that is there stands for an installed peer's.
PEER = replace(side_named("fla chunk"), module="json")
RING = side_named("sevenfold ring")
ABSENT = replace(side_named("seg_la"), module="no_such_peer")


class FakeApart:
    """Answers as its opener's name says; notes the order in which sides start and answer."""

    events: list[tuple[str, str]]
    answers: dict[tuple[str, str], Any]

    def __init__(self, opener: Callable[[], Any]) -> None:
        self.name = opener.args[0] if hasattr(opener, "args") else "machine"
        self.events.append(("start", self.name))

    def ask(self, item: Case | None, _timeout_s: float) -> Any:
        what = "ceilings" if item is None else item.name
        self.events.append((self.name, what))
        answer = self.answers[self.name, what]
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer.pop(0) if isinstance(answer, list) else answer

    def close(self) -> None:
        self.events.append(("close", self.name))


def right(median_s: float) -> dict[str, Any]:
    return {"status": "ok", "error": 1e-3, "error_rule": 0.5, "median_s": median_s, "runs": 3}


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> type[FakeApart]:
    FakeApart.events = []
    weighed = {"status": "ok", "error": 1e-3, "error_rule": 0.5, "extra_bytes": 5}
    FakeApart.answers = {
        ("machine", "ceilings"): [
            {"copy_bytes_per_s": 2.0**30, "matmul_flops_per_s": 8.0},
            {"copy_bytes_per_s": 2.0**31, "matmul_flops_per_s": 4.0},
        ],
        ("sevenfold", FORWARD.name): right(2.0),
        ("sevenfold", MEMORY.name): weighed,
        ("fla chunk", FORWARD.name): Failure("OutOfMemoryError: too much"),
        ("fla chunk", MEMORY.name): weighed,
    }
    monkeypatch.setattr(run, "Apart", FakeApart)
    return FakeApart


def test_sides_run_one_after_another_with_the_next_at_the_start(apart: type[FakeApart]) -> None:
    told: list[Any] = []
    sides = [OURS, ABSENT, RING, PEER]
    rows, ceilings = run_sides([FORWARD, MEMORY], sides, told.append)
    assert apart.events == [
        ("start", "machine"),
        ("start", "sevenfold"),
        ("machine", "ceilings"),
        ("start", "fla chunk"),
        ("sevenfold", FORWARD.name),
        ("sevenfold", MEMORY.name),
        ("close", "sevenfold"),
        ("fla chunk", FORWARD.name),
        ("fla chunk", MEMORY.name),
        ("close", "fla chunk"),
        ("machine", "ceilings"),
        ("close", "machine"),
    ]
    assert told == rows
    assert ceilings == {"copy_bytes_per_s": 2.0**31, "matmul_flops_per_s": 8.0}


def test_rows_have_floors_and_failures_their_reason(apart: type[FakeApart]) -> None:
    rows, _ = run_sides([FORWARD, MEMORY], [OURS, PEER], lambda row: None)
    ours, weighed, failed, _ = rows
    # 2^31 bytes at 2^31 bytes/s.
    assert (ours["floor_s"], ours["over_floor"]) == (1.0, 2.0)
    assert (weighed["floor_s"], weighed["over_floor"], weighed["extra_bytes"]) == (None, None, 5)
    assert (failed["status"], failed["note"]) == ("failed", "OutOfMemoryError: too much")
    assert (failed["floor_s"], failed["over_floor"]) == (1.0, None)
    assert (ours["side"], ours["ours"], failed["ours"]) == ("sevenfold", True, False)
    assert (ours["task"], ours["groups"], ours["target"]) == ("forward", ("forward",), 0.56e-3)
    assert [ours[key] for key in ("B", "T", "H", "layer", "lengths")] == [1, 32_768, 64, 40, None]


def test_after_an_interrupt_what_is_done_counts(apart: type[FakeApart]) -> None:
    apart.answers["fla chunk", FORWARD.name] = KeyboardInterrupt
    rows, ceilings = run_sides([FORWARD, MEMORY], [OURS, PEER], lambda row: None)
    assert [row["case"] for row in rows] == [FORWARD.name, MEMORY.name]
    # 2^31 bytes at the 2^30 bytes/s from before.
    assert (rows[0]["floor_s"], ceilings["copy_bytes_per_s"]) == (2.0, 2.0**30)
    assert apart.events[-1] == ("close", "machine")


def test_a_device_that_cannot_be_measured_ends_the_run(apart: type[FakeApart]) -> None:
    apart.answers["machine", "ceilings"] = Failure("RuntimeError: no device")
    with pytest.raises(SevenfoldError, match="the device must copy and multiply, got RuntimeError"):
        run_sides([FORWARD], [OURS], lambda row: None)


def test_slopes_are_those_of_the_rule() -> None:
    cases = [Case("", (), Task.FORWARD, 1, 1, 4, layer) for layer in (0, 79)]
    first, last = slopes_of([*cases, *cases])
    assert (first["H"], first["layer"], first["num_layers"]) == (4, 0, 80)
    single = torch.finfo(torch.float32).eps
    for found, factor in ((first, 1 + 1e-5), (last, 1e-5)):
        for slope, head in zip(found["slopes"], head_slopes(4), strict=True):
            assert abs(slope / (head * factor) - 1) < single


def test_a_record_is_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    rows = [{"case": "a", "median_s": 0.5}]
    record = build_record(rows, {"copy_bytes_per_s": 1.0}, [FORWARD], [OURS, ABSENT], "abc")
    path = tmp_path / "deep" / "record.json"
    write_json(path, record)
    assert json.loads(path.read_text()) == record
    assert list(record) == [
        *("command", "date", "device", "python", "cuda", "commit", "sides", "ceilings"),
        *("max_relative_error", "slopes", "rows"),
    ]
    assert (record["device"], record["commit"], record["rows"]) == ("NVIDIA H200", "abc", rows)
    assert record["sides"] == {
        "sevenfold": {"package": "sevenfold", "version": "0.1.0", "installed": True},
        "seg_la": {"package": "sglang", "version": None, "installed": False},
    }
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})


def test_a_devices_record_has_its_name() -> None:
    path = Path("benchmarks/results/kernels/nvidia-h100-80gb-hbm3.json")
    assert default_path("NVIDIA H100 80GB HBM3") == path


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, apart: type[FakeApart]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(command, "sides_of", lambda names: [OURS, ABSENT, PEER])
    monkeypatch.setattr(command, "cases_of", lambda groups: [FORWARD, MEMORY])


@pytest.mark.usefixtures("device")
def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    arguments = ["kernels", "--cases", "forward", "--out", str(out), "--commit", "abc1234"]
    done = CliRunner().invoke(bench_app, arguments)
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    assert lines[0] == "seg_la: not installed, left out"
    ours = "sevenfold | forward B1 T32768 H64 | ok 2,000 ms, relative error 1.0e-03, 0.50 of the"
    assert f"{ours} error rule" in lines
    failed = "fla chunk | forward B1 T32768 H64 | failed: OutOfMemoryError: too much"
    assert failed in lines
    assert "forward B1 T32768 H64: sevenfold 2,000 ms, 2.00 x floor, target 0.560 ms" in lines
    assert lines[-1] == f"written to {out}"
    record = json.loads(out.read_text())
    assert (record["commit"], len(record["rows"])) == ("abc1234", 4)
    assert not out.with_suffix(".svg").exists()


@pytest.mark.usefixtures("device")
def test_the_sweep_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(FORWARD, groups=("forward", "sweep"))
    monkeypatch.setattr(command, "cases_of", lambda groups: [case])
    lines: list[str] = []
    command.run_kernel_benchmark(Request(out=tmp_path / "a.json"), lines.append)
    assert lines[-1] == f"drawn in {tmp_path / 'a.svg'}"
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.usefixtures("device")
def test_a_wrong_result_of_ours_is_an_error_after_the_record(
    tmp_path: Path, apart: type[FakeApart]
) -> None:
    apart.answers["sevenfold", FORWARD.name]["status"] = "wrong"
    out = tmp_path / "a.json"
    with pytest.raises(SevenfoldError, match=r"must all be right, got forward B1 .*: wrong$"):
        command.run_kernel_benchmark(Request(out=out), lambda line: None)
    assert json.loads(out.read_text())["rows"][0]["status"] == "wrong"


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="must have a CUDA device, got none"):
        command.run_kernel_benchmark(Request(), lambda line: None)
