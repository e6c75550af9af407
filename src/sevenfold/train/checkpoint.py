"""Checkpoints of a run: weights, moments, counters and generators, visible by one rename.

A folder is complete before it gets its name: it is written as `.step-N.tmp`, flushed to the disk
and renamed. A process killed at any moment leaves whole checkpoints and perhaps a `.tmp`, which the
next start removes. Tensors are in PyTorch's distributed format, so that a later run may divide them
otherwise; its metadata is a pickle, so a run directory must come from someone you trust.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sevenfold.config import CheckpointError, parse_config
from sevenfold.models import HybridModel
from sevenfold.parallel import Layout, portable, portable_tensors
from sevenfold.train.batch import ALONE
from sevenfold.train.progress import Progress
from sevenfold.train.ranks import first_for_all

_STATE_FILE = "progress.json"
_NAME = re.compile(r"step-(\d+)")


def run_tensors(
    model: HybridModel, optimizer: torch.optim.Optimizer, layout: Layout = ALONE
) -> dict[str, Any]:
    """Return the tensors of a run by name, as views: saving reads them, loading writes them.

    Args:
        model: its weights and buffers.
        optimizer: its state, under the parameters' names.
        layout: how ranks divide them.

    Returns:
        Nested names to tensors; the generators' states are copies.
    """
    named = dict(model.named_parameters())
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in named.items()}
    generators = {"cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(model.device)
    tensors = {"model": model.state_dict(), "optimizer": moments, "generators": generators}
    return portable_tensors(tensors, layout)


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Any],
    progress: Progress,
    *,
    keep: int,
    layout: Layout = ALONE,
) -> Path:
    """Write one checkpoint and remove the oldest beyond `keep`; a step that has one keeps it.

    After a skipped step the counters have moved on and the step has not. Its checkpoint still
    stands for the run: going on from it reads the same samples and skips them again.

    Args:
        folder: of all checkpoints of the run; created when missing.
        tensors: as run_tensors returns them.
        progress: names the checkpoint by its step.
        keep: number of newest checkpoints that stay, at least 1.
        layout: of the run; all ranks call, each writes its part, the first does what is done once.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are untouched.
    """
    place = Place(folder, progress.step, keep, layout)
    if not place.is_taken():
        with place.removed_on_failure():
            place.begin(progress)
            _write_tensors(tensors, place.staging, layout)
            first_for_all(layout, place.publish)
    return place.final


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is written, and where it then stands.

    Args:
        folder: of all checkpoints of the run.
        step: its number.
        keep: number of newest checkpoints that stay.
        layout: of the run.
    """

    folder: Path
    step: int
    keep: int
    layout: Layout

    @property
    def final(self) -> Path:
        """The checkpoint."""
        return self.folder / f"step-{self.step}"

    @property
    def staging(self) -> Path:
        """Where it is written."""
        return self.folder / f".step-{self.step}.tmp"

    def is_taken(self) -> bool:
        """Whether the step has a checkpoint, as the first rank finds it; all ranks call."""
        return self.layout.agree(self.layout.is_first and self.final.exists())

    def begin(self, progress: Progress) -> None:
        """Make the folder, and write the counters; all ranks call."""

        def write() -> None:
            self.staging.mkdir(parents=True)
            _write_text(self.staging / _STATE_FILE, progress.model_dump_json(indent=2))

        first_for_all(self.layout, write)

    def publish(self) -> None:
        """Give the complete checkpoint its name, and remove the oldest; the first rank calls."""
        _sync_folder(self.staging)
        self.staging.rename(self.final)
        _sync_folder(self.folder)
        for old in list_checkpoints(self.folder)[: -self.keep]:
            _remove(old)

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove what is half-written where writing fails.

        Raises:
            CheckpointError: it did; says why, and what to do.
        """
        try:
            yield
        except (OSError, CheckpointException) as error:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise CheckpointError(
                f"{self.final} must be writable, got: {_cause(error)}; earlier checkpoints are "
                f"whole: free space and start the run again"
            ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; half-written ones do not show."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of)


def newest_for_all(folder: Path, layout: Layout) -> Path | None:
    """Return the newest checkpoint as the first rank finds it, None without one; all ranks call."""
    newest = next(reversed(list_checkpoints(folder)), None) if layout.is_first else None
    if not layout.agree(newest is not None):
        return None
    step = 0 if newest is None else _step_of(newest)
    return folder / f"step-{int(layout.sum_over_all(torch.tensor(step)))}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def read_progress(path: Path) -> Progress:
    """Read the counters of a checkpoint.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    file = path / _STATE_FILE
    try:
        return parse_config(Progress, json.loads(file.read_text(encoding="utf-8")), file.name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} must be a run's progress, got: {error}; remove {path} to go on from an "
            f"earlier checkpoint"
        ) from error


def load_checkpoint(path: Path, tensors: dict[str, Any], *, layout: Layout = ALONE) -> Progress:
    """Read a checkpoint into the tensors of a run, and set the generators.

    Args:
        path: one of list_checkpoints.
        tensors: as run_tensors returns them; overwritten in place.
        layout: of the run, which need not be the one that wrote it.

    Returns:
        The counters.

    Raises:
        CheckpointError: it is damaged, or its tensors are not the run's.
    """
    progress = read_progress(path)
    _read(tensors, path, layout)
    _set_generators(tensors["generators"])
    return progress


def _read(tensors: dict[str, Any], path: Path, layout: Layout) -> None:
    try:
        with single_process():
            load(tensors, storage_reader=FileSystemReader(path), no_dist=layout.is_alone)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{path} must hold this run's tensors, got: {_cause(error)}; remove it to go on from "
            f"an earlier checkpoint"
        ) from error


def _set_generators(generators: dict[str, Tensor]) -> None:
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])


def read_weights(path: Path, model: HybridModel) -> None:
    """Read a checkpoint's weights, whole, into a plain model of this process.

    Raises:
        CheckpointError: it is damaged, or its tensors are not the model's.
    """
    weights = {name: portable(name, x, ALONE) for name, x in model.state_dict().items()}
    _read({"model": weights}, path, ALONE)


def _write_tensors(tensors: dict[str, Any], folder: Path, layout: Layout) -> None:
    with single_process():
        save(tensors, storage_writer=TensorWriter(folder), no_dist=layout.is_alone)


class TensorWriter(FileSystemWriter):
    """Writes a rank's tensors, and raises what the system said where it cannot.

    torch's archive then fails to close, and of that error the other ranks hear no cause.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, and flush each file to the disk."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = _root_of(error)
            if cause is error:
                raise
            raise cause from None


@contextmanager
def single_process() -> Iterator[None]:
    """Silence the remark that there is no process group: that is what no_dist asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed in between, it is no checkpoint any more."""
    aside = path.with_name(f".{path.name}.tmp")
    path.rename(aside)
    shutil.rmtree(aside)


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: OSError | CheckpointException) -> str:
    """What stands behind torch's summary: the system's error if there is one."""
    if isinstance(error, OSError):
        return str(error)
    return str(_root_of(next(iter(error.failures.values()))[0]))


def _root_of(error: BaseException) -> BaseException:
    """The system's error behind another; that one itself if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
