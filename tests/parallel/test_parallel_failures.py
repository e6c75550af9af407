"""What one rank meets, all ranks end by: at the same step, with the same checkpoints."""

import json
from pathlib import Path

import pytest
from parallel_helpers import MODEL, run_ranks
from test_parallel_runs import data  # noqa: F401

from sevenfold.config import parse_config
from sevenfold.train import RunConfig, read_metrics
from sevenfold.train.toml import to_toml

MEASURED = {"step_time_s", "tokens_per_s", "flops_per_s", "mfu", "peak_memory_bytes"}
# Runs in one start of the processes: name, failure, what its run file says of [run].
RUNS = {
    "signalled": ("signalled", {}),
    "unreadable": ("unreadable", {}),
    "full": ("full_disk", {}),
    "full-async": ("full_disk", {"async_checkpoints": True}),
    "back": ("goes_back", {}),
    "back-async": ("goes_back", {"async_checkpoints": True}),
    "stuck": ("stuck", {}),
}


def config_of(
    folder: Path,
    name: str,
    data: Path,  # noqa: F811
    parallel: dict | None = None,
    **run: object,
) -> RunConfig:
    table = {
        "run": {
            "out": str(folder / name),
            "steps": 8,
            "checkpoint_every_steps": 2,
            "keep_checkpoints": 9,
            **run,
        },
        "data": {"path": str(data), "seq_len": 24},
        "model": MODEL
        | {
            "vocab_size": 304,
            "layer_types": ["linear_attention", "full_attention"],
            "sliding_window": None,
        },
        "optimizer": {"lr": 0.01},
        "batch": {"tokens_per_step": 4 * 24, "micro_batch_rows": 2},
        "guard": {"max_skipped_steps": 2, "rewind_after_skips": 2, "stall_s": 1.0},
        "parallel": parallel or {"shard": 2},
    }
    return parse_config(RunConfig, table, "test")


def run_file(
    folder: Path,
    name: str,
    data: Path,  # noqa: F811
    parallel: dict | None = None,
    **run: object,
) -> str:
    file = folder / f"{name}.toml"
    config = config_of(folder, name, data, parallel, **run)
    file.write_text(to_toml(config.model_dump(mode="json")), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Where all runs have ended."""
    made = tmp_path_factory.mktemp("failures")
    pairs = [(kind, run_file(made, name, data, **run)) for name, (kind, run) in RUNS.items()]
    run_ranks("failing", 2, made, *(part for pair in pairs for part in pair))
    return made


def ended(folder: Path, name: str) -> list[dict]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def checkpoints(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in (folder / name / "checkpoints").iterdir())


def lines(folder: Path, name: str) -> list[dict]:
    found = read_metrics(folder / name / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found]


def test_a_signal_to_one_rank_stops_all_at_one_step_and_saves(folder: Path) -> None:
    ranks = ended(folder, "signalled")
    assert [rank["signal"] for rank in ranks] == [None, "SIGTERM"]
    assert [rank["step"] for rank in ranks] == [4, 4]
    assert checkpoints(folder, "signalled") == ["step-2", "step-4"]
    assert [line["step"] for line in lines(folder, "signalled")] == [1, 2, 3, 4]


def test_a_shard_that_one_rank_cannot_read_ends_all_after_a_save(folder: Path) -> None:
    errors = [rank["error"] for rank in ended(folder, "unreadable")]
    assert errors[0].startswith("DataError: every rank must read its samples, got an error on anot")
    assert errors[1] == "DataError: tokens-7.bin must be readable, got: it is gone"
    assert checkpoints(folder, "unreadable") == ["step-2", "step-4"]


@pytest.mark.parametrize("name", ["full", "full-async"])
def test_a_disk_that_is_full_for_one_rank_is_told_by_all_and_loses_nothing(
    name: str, folder: Path
) -> None:
    for rank in ended(folder, name):
        assert "step-4 must be writable, got: " in rank["error"]
        assert "File too large" in rank["error"]
    assert checkpoints(folder, name) == ["step-2"]


def test_all_ranks_go_back_to_one_checkpoint_that_was_in_flight(folder: Path) -> None:
    for name in ("back", "back-async"):
        for rank in ended(folder, name):
            assert (rank["error"], rank["seen"], rank["step"]) == (None, ["step-4"], 8)
    assert lines(folder, "back-async") == lines(folder, "back")
    assert [line["goes_back"] for line in lines(folder, "back")].index(True) == 5
    assert checkpoints(folder, "back") == checkpoints(folder, "back-async")


def test_all_ranks_name_the_one_that_hangs_in_a_forward(folder: Path) -> None:
    assert [rank["step"] for rank in ended(folder, "stuck")] == [8, 8]
    assert_all_name_rank_one(folder / "stuck")


def assert_all_name_rank_one(out: Path) -> None:
    lines = [json.loads(line) for line in (out / "stalls.jsonl").read_text().splitlines()]
    last = {line["rank"]: line["waits_for"] for line in lines if line["step"] == 3}
    assert last.keys() == {0, 1}
    for named in last.values():
        assert [(one["rank"], one["in_exchange"]) for one in named] == [(1, False)]


@pytest.mark.slow
def test_so_they_do_in_exchanges_of_every_kind(data: Path, tmp_path: Path) -> None:  # noqa: F811
    layouts = {
        "tensor": {"tensor": 2},
        "context": {"context": 2},
        "ring": {"context": 2, "context_attention": "ring"},
        "pipeline": {"pipeline": 2},
    }
    files = [run_file(tmp_path, name, data, parallel) for name, parallel in layouts.items()]
    run_ranks("failing", 2, tmp_path, *(part for file in files for part in ("stuck", file)))
    for name in layouts:
        assert_all_name_rank_one(tmp_path / name)


@pytest.mark.slow
def test_a_rank_killed_during_a_save_beside_the_run_costs_that_save(
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = {"async_checkpoints": True}
    with pytest.raises(AssertionError):
        run_ranks("failing", 2, tmp_path / "1", "killed", run_file(tmp_path, "killed", data, **run))
    names = checkpoints(tmp_path, "killed")
    assert [name for name in names if name.startswith("step")] == ["step-2"]
    assert ".step-4.tmp" in names
    whole = run_file(tmp_path, "whole", data, **run)
    again = run_file(tmp_path, "killed", data, **run)
    run_ranks("failing", 2, tmp_path / "2", "none", again, "none", whole)
    assert checkpoints(tmp_path, "killed") == ["step-2", "step-4", "step-6", "step-8"]
    assert lines(tmp_path, "killed") == lines(tmp_path, "whole")
    finals = [(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "whole")]
    assert finals[0].read_bytes() == finals[1].read_bytes()
