"""What goes wrong on one rank of a run while the others are well."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from sevenfold.config import DataError
from sevenfold.data import PackedLoader
from sevenfold.models.block import Block
from sevenfold.train.checkpoint import load_checkpoint
from sevenfold.train.loop import fault_in
from sevenfold.train.pulse import STALLS_FILE, Heart
from sevenfold.train.saving import AsyncSaver, Saver

# Of a run whose steps have four rows: while one step computes, the next one's are read.
ROWS_OF_A_STEP = 4
FAILS_AT_STEP = 4
_PUBLISHED_LATE_S = 0.5


@dataclass(frozen=True)
class Run:
    """A run's folder, one of its ranks, and what that has seen."""

    rank: int
    out: Path
    seen: list[str] = field(default_factory=list)


@contextmanager
def none(run: Run) -> Iterator[None]:
    """Nothing goes wrong."""
    yield


def _reading(run: Run, act: Callable[[], None]) -> AbstractContextManager[object]:
    """Let rank 1 act where it reads the samples of the step that fails."""
    read = PackedLoader.sample

    def sample(self: PackedLoader, index: int) -> object:
        if run.rank == 1 and index >= FAILS_AT_STEP * ROWS_OF_A_STEP:
            act()
        return read(self, index)

    return patch.object(PackedLoader, "sample", sample)


@contextmanager
def signalled(run: Run) -> Iterator[None]:
    """SIGTERM reaches rank 1 alone."""
    with _reading(run, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        yield


@contextmanager
def unreadable(run: Run) -> Iterator[None]:
    """A shard that rank 1 alone reads is gone."""

    def fail() -> None:
        raise DataError("tokens-7.bin must be readable, got: it is gone")

    with _reading(run, fail):
        yield


@contextmanager
def full_disk(run: Run) -> Iterator[None]:
    """Rank 1's disk has no room for the second checkpoint."""
    save, limits = Saver.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(self: Saver, tensors: dict, progress: object) -> None:
        if run.rank == 1 and run.seen:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        run.seen.append("saves")
        kinds[type(self)](self, tensors, progress)

    kinds = {Saver: save, AsyncSaver: AsyncSaver.save}
    try:
        with patch.object(Saver, "save", limited), patch.object(AsyncSaver, "save", limited):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def goes_back(run: Run) -> Iterator[None]:
    """Two steps fail, and the first rank gives the save in flight its name a moment late.

    What is seen are the checkpoints that this rank goes back to.
    """
    look, steps = AsyncSaver.look, []

    def faulty(*arguments: object) -> str | None:
        steps.append("step")
        return "made up" if len(steps) in (5, 6) else fault_in(*arguments)  # pyright: ignore

    def late(self: AsyncSaver) -> None:
        if len(steps) >= 6:
            if self.layout.is_first and self._written is not None:
                self._written.result()
                time.sleep(_PUBLISHED_LATE_S)
            look(self)

    def loads(path: Path, *arguments: object, **named: object) -> object:
        run.seen.append(path.name)
        return load_checkpoint(path, *arguments, **named)  # pyright: ignore

    with (
        patch("sevenfold.train.loop.fault_in", faulty),
        patch.object(AsyncSaver, "look", late),
        patch("sevenfold.train.run.load_checkpoint", loads),
    ):
        yield


@contextmanager
def killed(run: Run) -> Iterator[None]:
    """Rank 1 is killed while the second checkpoint is being written."""
    save = AsyncSaver.save

    def dying(self: AsyncSaver, tensors: dict, progress: object) -> None:
        save(self, tensors, progress)
        run.seen.append("saves")
        if run.rank == 1 and len(run.seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(AsyncSaver, "save", dying):
        yield


@contextmanager
def stuck(run: Run) -> Iterator[None]:
    """Rank 1 hangs in a forward of its fourth step, until both ranks have told of it."""
    forward, beat, steps = Block.forward, Heart.beat, [0]

    def noted(self: Heart, doing: str, step: int | None = None) -> None:
        steps.append(steps[-1] if step is None else step)
        beat(self, doing, step)

    def told() -> set[int]:
        file = run.out / STALLS_FILE
        lines = file.read_text().splitlines() if file.exists() else []
        return {line["rank"] for line in map(json.loads, lines) if line["step"] == 3}

    def hanging(self: Block, *arguments: object) -> object:
        until = time.monotonic() + 120
        while run.rank == 1 and steps[-1] == 3 and time.monotonic() < until:
            if told() == {0, 1}:
                break
            time.sleep(0.02)
        return forward(self, *arguments)  # pyright: ignore

    with patch.object(Block, "forward", hanging), patch.object(Heart, "beat", noted):
        yield


FAILURES: dict[str, Callable[[Run], AbstractContextManager[None]]] = {
    failure.__name__: failure
    for failure in (none, signalled, unreadable, full_disk, goes_back, killed, stuck)
}
