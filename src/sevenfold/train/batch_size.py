"""How many rows a step has where the loss decides: the critical batch, by doublings."""

from sevenfold.train.config import RunConfig
from sevenfold.train.progress import Progress


def with_rows(progress: Progress, config: RunConfig) -> Progress:
    """Return a run's first progress with the rows of its first two steps."""
    if config.batch.critical is None or progress.rows is not None:
        return progress
    rows = config.batch.tokens_per_step // config.data.seq_len
    return progress.model_copy(update={"rows": (rows, rows)})


def rows_now(progress: Progress) -> int | None:
    """Return the rows of the step that begins with next_sample; None where no loss decides."""
    return None if progress.rows is None else progress.rows[0]


def next_rows(progress: Progress, loss: float | None, config: RunConfig) -> Progress:
    """Decide the rows of the step after the next, read before the next one's loss is known.

    They double when twice as many tokens are no more than the critical batch of the smoothed loss.

    Args:
        progress: after a step.
        loss: of its update; None if it was skipped.
        config: config.batch.critical has the law; without one nothing changes.
    """
    law = config.batch.critical
    if law is None or progress.rows is None:
        return progress
    smoothed = progress.smoothed_loss
    if loss is not None:
        share = 1 / law.smoothing_steps
        smoothed = loss if smoothed is None else smoothed + share * (loss - smoothed)
    rows = progress.rows[1]
    doubled = 2 * rows * config.data.seq_len
    if smoothed is not None and doubled <= min(law.tokens_at(smoothed), law.max_tokens_per_step):
        rows *= 2
    return progress.model_copy(update={"rows": (progress.rows[1], rows), "smoothed_loss": smoothed})
