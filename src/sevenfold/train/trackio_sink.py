"""Metrics as a Trackio dashboard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from sevenfold.config import UnsupportedError
from sevenfold.train.config import RunConfig
from sevenfold.train.metrics import StepRecord


@contextmanager
def trackio_listener(config: RunConfig) -> Iterator[tuple[Callable[[StepRecord], None], ...]]:
    """Give the listener that logs to Trackio, none if the run wants none.

    A run that goes on logs the steps since its checkpoint a second time.

    Args:
        config: run.trackio names the project; the run is called as its folder is.

    Yields:
        No listener or one.

    Raises:
        UnsupportedError: Trackio is not installed.
    """
    project = config.run.trackio
    if project is None:
        yield ()
        return
    try:
        trackio = import_module("trackio")
    except ImportError as error:
        raise UnsupportedError(
            f"run.trackio must be left out without Trackio, got {project!r}; "
            f"pip install sevenfold[trackio]"
        ) from error
    settings = config.model_dump(mode="json")
    trackio.init(project=project, name=config.run.out.name, config=settings, resume="allow")

    def write(record: StepRecord) -> None:
        if record.skipped is None:
            trackio.log(record.scalars(), step=record.step)

    try:
        yield (write,)
    finally:
        trackio.finish()
