import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from train_helpers import differing, flat, tiny_model

from sevenfold.config import CheckpointError
from sevenfold.optim import AdamWConfig, build_adamw
from sevenfold.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    read_progress,
    remove_unfinished,
    run_tensors,
    save_checkpoint,
)
from sevenfold.train.progress import Progress


def tensors_after_a_step(seed: int, **changes) -> dict:
    model = tiny_model(seed=seed, **changes)
    optimizer = build_adamw(model.named_parameters(), AdamWConfig(lr=0.1))
    model(torch.arange(8)[None]).square().sum().backward()
    optimizer.step()
    return run_tensors(model, optimizer)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = tensors_after_a_step(1), tensors_after_a_step(2)
    progress = Progress(step=7, next_sample=21, num_skipped=1, num_labels=600, num_bytes=2000)
    path = save_checkpoint(tmp_path, saved, progress, keep=2)
    expected = flat(saved)
    torch.rand(3)  # moves the generator on
    assert len(differing(expected, flat(other))) > 10
    assert load_checkpoint(path, other) == progress
    assert differing(expected, flat(other)) == []
    assert torch.equal(torch.get_rng_state(), expected["generators.cpu"])


def test_moments_go_by_the_parameters_names() -> None:
    tensors = tensors_after_a_step(1)
    assert set(tensors["optimizer"]["layers.1.self_attn.q_proj.weight"]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert tensors["optimizer"]["norm.weight"]["step"].item() == 1.0


def test_the_newest_are_kept_and_sorted_by_number(tmp_path: Path) -> None:
    tensors = tensors_after_a_step(1)
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, tensors, Progress(step=step), keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10", "step-11"]
    assert names(tmp_path) == ["step-10", "step-11", "step-9"]


def test_what_a_kill_left_half_written_does_not_show_and_goes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tensors_after_a_step(1), Progress(step=4), keep=1)
    half = tmp_path / ".step-5.tmp"
    half.mkdir()
    (half / "progress.json").write_text("{")
    assert list_checkpoints(tmp_path) == [path]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["step-4"]


def test_a_step_that_has_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    tensors = tensors_after_a_step(1)
    save_checkpoint(tmp_path, tensors, Progress(step=4, next_sample=8), keep=1)
    path = save_checkpoint(tmp_path, tensors, Progress(step=4, next_sample=12), keep=1)
    assert read_progress(path).next_sample == 8


@contextmanager
def files_of_at_most(num_bytes: int):
    """The system refuses to let files grow beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    tensors = tensors_after_a_step(1)
    first = save_checkpoint(tmp_path, tensors, Progress(step=1), keep=1)
    with (
        files_of_at_most(4096),
        pytest.raises(
            CheckpointError,
            match=r"step-2 must be writable, got: .*File too large; earlier checkpoints are whole: "
            r"free space",
        ),
    ):
        save_checkpoint(tmp_path, tensors, Progress(step=2), keep=1)
    assert names(tmp_path) == ["step-1"]
    assert load_checkpoint(first, tensors_after_a_step(2)) == Progress(step=1)


def test_a_checkpoint_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step-2 must be writable, got: .*Not a directory"):
        save_checkpoint(tmp_path / "file", tensors_after_a_step(1), Progress(step=2), keep=1)


@pytest.mark.parametrize("text", [None, "{", json.dumps({"step": "four"}), "\xff"])
def test_damaged_counters_are_named(tmp_path: Path, text: str | None) -> None:
    path = save_checkpoint(tmp_path, tensors_after_a_step(1), Progress(step=4), keep=1)
    file = path / "progress.json"
    file.unlink() if text is None else file.write_text(text, encoding="latin-1")
    with pytest.raises(
        CheckpointError, match=r"progress\.json must be a run's progress, got: .*; remove .*step-4"
    ):
        read_progress(path)


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tensors_after_a_step(1), Progress(step=4), keep=1)
    wider = tensors_after_a_step(1, intermediate_size=32)
    with pytest.raises(
        CheckpointError, match=r"step-4 must hold this run's tensors, got: .*[Ss]ize mismatch"
    ):
        load_checkpoint(path, wider)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-4 must hold this run's tensors, got: .*No such"
    ):
        load_checkpoint(path, tensors_after_a_step(1))
