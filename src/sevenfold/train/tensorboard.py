"""Metrics as TensorBoard's files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sevenfold.config import UnsupportedError
from sevenfold.train.config import RunSection
from sevenfold.train.metrics import StepRecord

TENSORBOARD = "tensorboard"


@contextmanager
def tensorboard_listener(
    run: RunSection, first_step: int
) -> Iterator[tuple[Callable[[StepRecord], None], ...]]:
    """Give the listener that writes TensorBoard's files, none if the run wants none.

    Args:
        run: run.tensorboard switches it on; files go to run.out/tensorboard.
        first_step: of this process; what an earlier one wrote beyond it is hidden.

    Yields:
        No listener or one.

    Raises:
        UnsupportedError: TensorBoard is not installed.
    """
    if not run.tensorboard:
        yield ()
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnsupportedError(
            "run.tensorboard must be false without TensorBoard, got true; "
            "pip install sevenfold[tensorboard]"
        ) from error
    with SummaryWriter(str(run.out / TENSORBOARD), purge_step=first_step + 1) as writer:

        def write(record: StepRecord) -> None:
            if record.skipped is not None:
                return
            for name, value in record.scalars().items():
                writer.add_scalar(name, value, record.step)

        yield (write,)
