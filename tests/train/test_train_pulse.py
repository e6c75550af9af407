"""Signs of life: who is missing, what is written, when a process ends."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
from train_helpers import config_of

from sevenfold.train import train
from sevenfold.train.config import GuardSection
from sevenfold.train.pulse import (
    EXIT_STALLED,
    SILENT,
    WAITS,
    Heart,
    Sign,
    in_exchange,
    missing_ranks,
    read_signs,
    remove_signs,
    watched,
)


def sign(rank: int, step: int, doing: str) -> Sign:
    return Sign(rank, "host", step, doing, 0.0)


@pytest.mark.parametrize(
    ("signs", "missing"),
    [
        ([sign(0, 5, WAITS), sign(1, 5, "reads"), sign(2, 5, WAITS)], [1]),
        ([sign(0, 5, WAITS), sign(1, 5, "reads"), sign(2, 4, "computes")], [2]),
        ([sign(0, 5, WAITS), sign(1, 4, WAITS)], [1]),  # all wait: the exchange hangs
        ([replace(sign(0, 5, "computes"), in_exchange=True), sign(1, 5, "computes")], [1]),
        ([sign(0, 3, "saves")], [0]),
        ([], []),
    ],
)
def test_the_missing_are_those_that_do_not_wait(signs: list[Sign], missing: list[int]) -> None:
    assert [one.rank for one in missing_ranks(signs)] == missing


def test_signs_are_read_as_they_were_written(tmp_path: Path) -> None:
    hearts = [Heart(tmp_path, rank) for rank in (1, 0)]
    hearts[0].beat("reads", 7)
    assert [s.doing for s in read_signs(tmp_path)] == ["starts", "starts"]
    hearts[0].write()
    found = read_signs(tmp_path)
    assert [(s.rank, s.step, s.doing) for s in found] == [(0, 0, "starts"), (1, 7, "reads")]
    assert found[1] == hearts[0].sign


def test_a_stall_names_the_rank_that_is_waited_for_and_ends_the_process(tmp_path: Path) -> None:
    guard = GuardSection(stall_s=0.05, exit_stalled_s=0.2)
    codes: list[int] = []
    with watched(tmp_path, 0, guard, codes.append) as pulse:
        slow = Heart(tmp_path / "heartbeats", 1)
        slow.beat("reads", 3)
        slow.write()
        pulse.beat(WAITS, 3)
        deadline = time.monotonic() + 30
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes == [EXIT_STALLED]
    [line] = map(json.loads, (tmp_path / "stalls.jsonl").read_text().splitlines())
    assert (line["rank"], line["doing"], line["step"]) == (0, WAITS, 3)
    assert [(one["rank"], one["doing"]) for one in line["waits_for"]] == [(1, "reads")]
    assert line["waited_s"] >= 0.05


def test_a_run_that_moves_is_not_reported_and_one_without_the_guard_writes_nothing(
    run_values: dict,
) -> None:
    result = train(config_of(run_values, guard={"stall_s": 600.0}))
    [found] = read_signs(result.folder / "heartbeats")
    assert found.rank == 0
    assert not (result.folder / "stalls.jsonl").exists()
    with watched(result.folder, 0, GuardSection()) as pulse:
        assert pulse is SILENT


def frame_in(*files: str, name: str = "call") -> FrameType:
    """A frame of a function of that name in the last file, called from those before."""
    names: dict = {"sys": sys}
    exec(compile(f"def {name}(_): return sys._getframe()", f"/lib/{files[-1]}", "exec"), names)
    names["call"] = names[name]
    for file in reversed(files[:-1]):
        inner, names = names["call"], {}
        names["inner"] = inner
        exec(compile("def call(_): return inner(_)", f"/lib/{file}", "exec"), names)
    return names["call"](None)


@pytest.mark.parametrize(
    ("files", "waits"),
    [
        (("sevenfold/parallel/layout.py", "torch/distributed/distributed_c10d.py"), True),
        (("torch/distributed/_functional_collectives.py", "torch/_ops.py"), True),
        (("torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py",), True),
        (("sevenfold/parallel/context/softmax.py",), False),
        (("torch/distributed/fsdp/_fully_shard/_fsdp_state.py", "sevenfold/models/x.py"), False),
        (("torch/distributed/checkpoint/filesystem.py",), False),
        (("sevenfold/ops/linear/api.py", "torch/_ops.py"), False),
    ],
)
def test_a_thread_waits_where_it_stands_in_an_exchange(files: tuple[str, ...], waits: bool) -> None:
    assert in_exchange(frame_in(*files)) == waits


def test_the_package_waits_where_it_says_so() -> None:
    assert in_exchange(frame_in("sevenfold/parallel/collectives.py", name="finish"))
    assert in_exchange(frame_in("sevenfold/parallel/context/softmax.py", name="wait"))
    assert not in_exchange(frame_in("sevenfold/train/saving.py", name="finish"))


def test_signs_of_an_earlier_start_are_removed(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    Heart(tmp_path / "heartbeats", 3)
    remove_signs(tmp_path)
    assert read_signs(tmp_path / "heartbeats") == []
    remove_signs(tmp_path / "new")
