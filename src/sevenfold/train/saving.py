"""When checkpoints are written: while the run waits, or beside its next steps."""

from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from torch import distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from sevenfold.parallel import Layout
from sevenfold.train.checkpoint import Place, TensorWriter, save_checkpoint, single_process
from sevenfold.train.progress import Progress
from sevenfold.train.ranks import first_for_all


class Saver:
    """Writes checkpoints while the run waits.

    Args:
        folder: of all checkpoints of the run.
        keep: number of newest checkpoints that stay.
        layout: of the run.
    """

    def __init__(self, folder: Path, keep: int, layout: Layout) -> None:
        self.folder, self.keep, self.layout = folder, keep, layout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()

    def save(self, tensors: dict[str, Any], progress: Progress) -> None:
        """Write a checkpoint, as save_checkpoint does; all ranks call."""
        save_checkpoint(self.folder, tensors, progress, keep=self.keep, layout=self.layout)

    def look(self) -> None:
        """Give what is complete by now its name; called after every step."""

    def finish(self) -> None:
        """Wait for what is being written; all ranks call."""


class AsyncSaver(Saver):
    """Copies the tensors to the host's memory, and writes them beside the next steps.

    A checkpoint gets its name by the same one rename, when all ranks have written their part: a
    process that is killed before leaves the earlier checkpoints. One is written at a time.
    """

    def __init__(self, folder: Path, keep: int, layout: Layout) -> None:
        super().__init__(folder, keep, layout)
        # The writing thread's exchanges must not mix with the run's: it has a group of its own.
        self._group = None if layout.is_alone else dist.new_group(backend="gloo")
        self._place: Place | None = None
        self._written: Future[Any] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        # In the run's thread: Python's filters of warnings are one for all threads.
        self._stack.enter_context(single_process())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self.finish()
            elif self._written is not None:
                self._written.exception()  # the run has failed: only wait for the thread
                self.look()

    def save(self, tensors: dict[str, Any], progress: Progress) -> None:
        """Copy the tensors, and begin to write them.

        Raises:
            CheckpointError: the checkpoint before could not be written; those before it are whole.
        """
        self.finish()
        place = Place(self.folder, progress.step, self.keep, self.layout)
        if place.is_taken():
            return
        with place.removed_on_failure():
            place.begin(progress)
            self._written = async_save(  # pyright: ignore[reportAttributeAccessIssue]
                tensors,
                storage_writer=TensorWriter(place.staging),
                process_group=self._group,  # pyright: ignore[reportArgumentType]
                async_stager=DefaultStager(StagingOptions(False, False, False, False)),
                no_dist=self.layout.is_alone,
            )
        self._place = place

    def look(self) -> None:
        """Give a complete checkpoint its name; the others hear of it when they look for it."""
        done = self._written is not None and self._written.done() and not self._written.exception()
        if done and self._place is not None and self.layout.is_first:
            self._publish(self._place)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: it could not be; those before it are whole.
        """
        if self._written is None or self._place is None:
            return
        place, written = self._place, self._written
        self._place = self._written = None
        with place.removed_on_failure():
            written.result()
            first_for_all(self.layout, lambda: self._publish(place))

    @staticmethod
    def _publish(place: Place) -> None:
        if not place.final.exists():
            place.publish()


def open_saver(folder: Path, keep: int, layout: Layout, *, asynchronous: bool) -> Saver:
    """Return what writes a run's checkpoints; all ranks call."""
    return (AsyncSaver if asynchronous else Saver)(folder, keep, layout)
