"""Reporting how far a preparation is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Stage = Literal["hash sources", "survey", "train tokenizer", "encode", "already prepared"]


@dataclass(frozen=True)
class PrepareProgress:
    """One report.

    Args:
        stage: what is going on.
        done_bytes: bytes of input dealt with in this stage.
        total_bytes: bytes of this stage; None when not yet known.
    """

    stage: Stage
    done_bytes: int
    total_bytes: int | None


ProgressCallback = Callable[[PrepareProgress], None]


class StageReporter:
    """Counts the bytes of one stage and hands them to a callback.

    Args:
        stage: the stage.
        total_bytes: its size; None when unknown.
        callback: the receiver, or None for nobody.
    """

    def __init__(
        self, stage: Stage, total_bytes: int | None, callback: ProgressCallback | None
    ) -> None:
        self._stage: Stage = stage
        self._total_bytes = total_bytes
        self._callback = callback
        self.done_bytes = 0

    def advance(self, num_bytes: int) -> None:
        """Add bytes to what is done and report."""
        self.done_bytes += num_bytes
        if self._callback is not None:
            self._callback(PrepareProgress(self._stage, self.done_bytes, self._total_bytes))


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """Show reports as one rich progress bar per stage.

    Args:
        console: where to draw.

    Yields:
        The callback to hand to `prepare`.
    """
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[Stage, TaskID] = {}
    with Progress(*columns, console=console) as bar:

        def show(report: PrepareProgress) -> None:
            if report.stage not in tasks:
                tasks[report.stage] = bar.add_task(report.stage, total=report.total_bytes)
            bar.update(tasks[report.stage], completed=report.done_bytes)

        yield show
