import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_train_checkpoint import files_of_at_most

from sevenfold.config import TrainingError
from sevenfold.train.metrics import (
    MetricsFile,
    StepRecord,
    finite,
    read_metrics,
    truncate_metrics,
)

RECORD = StepRecord(
    step=3,
    next_sample=9,
    tokens=288,
    loss=2.5,
    bits_per_byte=1.25,
    balance_loss=None,
    z_loss=None,
    dropped=None,
    grad_norm=0.5,
    lr=0.001,
    skipped=None,
    step_time_s=0.5,
    tokens_per_s=192.0,
    flops_per_s=2e9,
    mfu=None,
    peak_memory_bytes=1024,
)


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(RECORD)
        (line,) = read_metrics(path)
    assert line["loss"] == 2.5
    assert line["mfu"] is None
    assert list(line) == [
        *("step", "next_sample", "tokens", "loss", "bits_per_byte", "balance_loss", "z_loss"),
        *("dropped", "grad_norm", "lr", "skipped", "step_time_s", "tokens_per_s", "flops_per_s"),
        *("mfu", "peak_memory_bytes", "validation_loss", "validation_bits_per_byte"),
        *("validation_loss_by_position", "validation_loss_by_length"),
        *("dropped_by_layer", "load_by_layer", "goes_back"),
    ]


def test_numbers_that_json_lacks_become_null() -> None:
    assert [finite(x) for x in (1.5, float("nan"), float("inf"))] == [1.5, None, None]
    with pytest.raises(ValueError, match="JSON"):
        replace(RECORD, loss=float("nan")).as_json()


def test_lines_beyond_the_checkpoint_and_half_a_line_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        replace(RECORD, step=s, next_sample=3 * n).as_json() for s, n in ((1, 1), (1, 2), (2, 3))
    ]
    path.write_text("\n".join(lines) + '\n{"step": 3, "next_sam', encoding="utf-8")
    assert [line["next_sample"] for line in read_metrics(path)] == [3, 6, 9]
    truncate_metrics(path, 6)
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:2]) + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
    (tmp_path / "half").write_text('{"step"')
    assert read_metrics(tmp_path / "half") == []


def test_rewriting_keeps_every_bit_of_a_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    loss = 0.1 + 0.2
    path.write_text(replace(RECORD, loss=loss).as_json() + "\n")
    truncate_metrics(path, 9)
    assert json.loads(path.read_text())["loss"] == loss


def test_a_disk_that_refuses_a_line_is_an_error(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(RECORD)
        with (
            files_of_at_most((tmp_path / "metrics.jsonl").stat().st_size),
            pytest.raises(
                TrainingError, match=r"metrics\.jsonl must be writable, got: File too large; free"
            ),
        ):
            metrics.write(RECORD)


def test_a_disk_that_fails_when_it_must_keep_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(RECORD)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(
            TrainingError, match=r"got: No space left on device; free space and sta"
        ):
            metrics.sync()
        monkeypatch.undo()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
