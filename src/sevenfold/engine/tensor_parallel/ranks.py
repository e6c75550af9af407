"""Starting the ranks that serve a model together on one machine."""

import logging
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import torch

from sevenfold.config import ConfigError
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.tensor_parallel.joining import Joined, Joining, Part, join
from sevenfold.engine.tensor_parallel.leader import LeadingWorker
from sevenfold.engine.worker import WorkerConfig
from sevenfold.models import HybridModel
from sevenfold.models.accounting import WeightFormat

_FOLLOWER = "sevenfold.engine.tensor_parallel"
_END_S = 10.0
_log = logging.getLogger("sevenfold.engine")


class Ranks:
    """The other ranks of a model, in processes of their own; they end with this one."""

    def __init__(
        self,
        joined: Joined,
        processes: Sequence[subprocess.Popen],
        meeting: tempfile.TemporaryDirectory,
    ) -> None:
        self._joined, self._processes = joined, processes
        # NCCL meets there once more, when a group is first used.
        self._meeting = meeting
        self._worker: LeadingWorker | None = None
        self._end = weakref.finalize(self, _end, processes)

    @property
    def size(self) -> int:
        """How many ranks there are, this one among them."""
        return 1 + len(self._processes)

    def lead(self, plan: MemoryPlan, config: WorkerConfig) -> LeadingWorker:
        """Let every rank allocate the plan's memory for its part of the model; once.

        Raises:
            ConfigError: as Worker, or snapshot_dtype is auto: a rank does not know all heads.
        """
        if plan.snapshot_dtype == "auto":
            raise ConfigError(
                "snapshot_dtype must name one precision with tensor_parallel, got auto, which "
                "chooses by all heads of a layer"
            )
        self._channel.send_text(Part.of(plan, config).model_dump_json())
        self._worker = LeadingWorker(self._joined.model, plan, config, self._channel)
        return self._worker

    def close(self) -> None:
        """End the other ranks; one that does not end in time is killed.

        All leave at the same time: NCCL lets none go before the others do.
        """
        if not self._end.alive:
            return
        worker = self._worker
        leaving = Thread(target=self._leave, name="sevenfold-leave", daemon=True)
        if worker is None or worker.has_left:  # they wait for a plan, or for this rank
            self._end()
        leaving.start()
        if self._end.alive:
            _wait(self._processes, time.monotonic() + _END_S)
            self._end()
        leaving.join(_END_S)
        if leaving.is_alive():
            _log.warning("the first rank did not leave its group within %g s", _END_S)
        self._meeting.cleanup()

    def _leave(self) -> None:
        """Tell the others to leave, and do so; those that were left hear nothing any more."""
        if self._worker is not None and self._worker.has_left:
            self._joined.abandon()
            return
        try:
            if self._worker is not None:
                self._worker.stop()
        except RuntimeError as error:
            _log.warning("a rank had ended before it was told to: %s", error)
        self._joined.leave(self._worker)

    @property
    def _channel(self) -> Channel:
        return self._joined.channel


def start_ranks(
    checkpoint: Path,
    num_ranks: int,
    *,
    device: str,
    dtype: torch.dtype | None,
    weights: WeightFormat | None = None,
) -> tuple[HybridModel, Ranks]:
    """Load a checkpoint in parts: one here, each other in a process that is started now.

    Args:
        checkpoint: the folder.
        num_ranks: 2 or more, which must divide heads, widths and vocabulary.
        device: "cpu" or "cuda"; rank n takes GPU n.
        dtype: of the weights; None keeps the file's.
        weights: which matrices each rank quantises as it reads its part, and to what; None none.

    Returns:
        The first part, which computes what the whole model computes where all ranks compute, and
        the ranks.

    Raises:
        CheckpointError, UnsupportedError: as load_model.
        ConfigError: num_ranks does not divide the model's sizes, there are fewer GPUs, or weights
            has no effect on the model.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda with tensor_parallel, got {device!r}")
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        raise ConfigError(
            f"tensor_parallel must be at most the {torch.cuda.device_count()} GPUs of this "
            f"machine, got {num_ranks}"
        )
    meeting = tempfile.TemporaryDirectory(prefix="sevenfold-ranks-")
    ranks = [
        Joining(
            checkpoint=str(checkpoint),
            device=device,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            weights=weights,
            rank=rank,
            num_ranks=num_ranks,
            store=str(Path(meeting.name) / "store"),
        )
        for rank in range(num_ranks)
    ]
    processes = [_start(joining) for joining in ranks[1:]]
    try:
        joined = join(ranks[0])
    except BaseException:
        _end(processes)
        meeting.cleanup()
        raise
    return joined.model, Ranks(joined, processes, meeting)


def _start(joining: Joining) -> subprocess.Popen:
    command = [sys.executable, "-m", _FOLLOWER, joining.model_dump_json()]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def _wait(processes: Sequence[subprocess.Popen], until_s: float) -> None:
    """Wait for processes to end, at most until a time of time.monotonic."""
    for process in processes:
        try:
            process.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            _log.warning("rank process %d did not end when it was told to: killed", process.pid)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()
