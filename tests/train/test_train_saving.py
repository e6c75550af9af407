"""Checkpoints that are written beside the run: what they hold, when they show, how they fail."""

from pathlib import Path

import pytest
import torch
from test_train_checkpoint import files_of_at_most, names, tensors_after_a_step
from train_helpers import config_of, differing, flat, run_table

from sevenfold.config import CheckpointError
from sevenfold.parallel import Layout, ParallelConfig
from sevenfold.train import read_metrics, train
from sevenfold.train.checkpoint import list_checkpoints, load_checkpoint
from sevenfold.train.progress import Progress
from sevenfold.train.saving import AsyncSaver, Saver, open_saver

ALONE = Layout(ParallelConfig())


def changed(tensors: dict) -> None:
    """Move every tensor on, as the next step would."""
    with torch.no_grad():
        for x in flat(tensors).values():
            x.add_(1)


def test_the_option_chooses() -> None:
    assert type(open_saver(Path(), 1, ALONE, asynchronous=False)) is Saver
    assert type(open_saver(Path(), 1, ALONE, asynchronous=True)) is AsyncSaver


def test_it_holds_the_moment_of_saving_whatever_comes_next(tmp_path: Path) -> None:
    saved, other = tensors_after_a_step(1), tensors_after_a_step(2)
    expected = {name: x.clone() for name, x in flat(saved).items()}
    with AsyncSaver(tmp_path, 2, ALONE) as saver:
        saver.save(saved, Progress(step=3, next_sample=9))
        changed(saved)
    assert load_checkpoint(tmp_path / "step-3", other) == Progress(step=3, next_sample=9)
    assert differing(expected, flat(other)) == []


def test_it_gets_its_name_when_it_is_complete_and_looked_for(tmp_path: Path) -> None:
    tensors = tensors_after_a_step(1)
    with AsyncSaver(tmp_path, 1, ALONE) as saver:
        saver.save(tensors, Progress(step=3))
        assert names(tmp_path) == [".step-3.tmp"]
        assert saver._written is not None
        saver._written.result()
        assert list_checkpoints(tmp_path) == []
        saver.look()
        assert names(tmp_path) == ["step-3"]
        saver.save(tensors, Progress(step=3))  # has one: keeps it
        saver.save(tensors, Progress(step=4))
        saver.save(tensors, Progress(step=5))  # waits for the one before
        assert names(tmp_path) == [".step-5.tmp", "step-4"]
    assert names(tmp_path) == ["step-5"]


def test_a_run_that_fails_keeps_what_it_had_begun_to_save(tmp_path: Path) -> None:
    def failing() -> None:
        with AsyncSaver(tmp_path, 1, ALONE) as saver:
            saver.save(tensors_after_a_step(1), Progress(step=3))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert names(tmp_path) == ["step-3"]


def test_a_full_disk_is_told_at_the_next_save_and_loses_nothing(tmp_path: Path) -> None:
    tensors = tensors_after_a_step(1)
    with AsyncSaver(tmp_path, 2, ALONE) as saver:
        saver.save(tensors, Progress(step=1))
        saver.finish()
        with files_of_at_most(4096):
            saver.save(tensors, Progress(step=2))
            saver._written.exception()
        saver.look()
        with pytest.raises(CheckpointError, match=r"step-2 must be writable, got: .*File too lar"):
            saver.save(tensors, Progress(step=3))
        assert names(tmp_path) == ["step-1"]
        saver.save(tensors, Progress(step=3))
    assert names(tmp_path) == ["step-1", "step-3"]
    assert load_checkpoint(tmp_path / "step-1", tensors_after_a_step(2)) == Progress(step=1)


def test_a_run_is_the_same_either_way(data_path: Path, tmp_path: Path) -> None:
    folders = []
    for asynchronous in (False, True):
        out = tmp_path / str(asynchronous)
        changes = {"checkpoint_every_steps": 1, "keep_checkpoints": 9, "steps": 3}
        config = config_of(
            run_table(data_path, out), run=changes | {"async_checkpoints": asynchronous}
        )
        folders.append(train(config).folder)
    losses = [[line["loss"] for line in read_metrics(f / "metrics.jsonl")] for f in folders]
    assert losses[0] == losses[1]
    kept = [names(folder / "checkpoints") for folder in folders]
    assert kept == [["step-1", "step-2", "step-3"]] * 2
    for name in kept[0]:
        found = [tensors_after_a_step(1) for _ in folders]
        for folder, tensors in zip(folders, found, strict=True):
            load_checkpoint(folder / "checkpoints" / name, tensors)
        assert differing(flat(found[0]), flat(found[1])) == []
