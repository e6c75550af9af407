"""Where a run stands."""

from sevenfold.config import StrictModel


class Progress(StrictModel):
    """All that a run counts; with the weights and the moments it is the whole state.

    Args:
        step: updates done.
        next_sample: index of the first sample that no step has read.
        skipped_in_a_row: steps skipped since the last update.
        num_skipped: steps skipped in the whole run.
        num_rewinds: how often the run went back to a checkpoint.
        num_labels: labels that the updates have learnt from.
        num_bytes: UTF-8 bytes that those labels stand for.
        recent_losses, recent_norms: of the last updates, where the guard looks for spikes.
        smoothed_loss: where the loss decides the batch.
        rows: of the step that begins with next_sample, and of the one after, which is read before
            that step's loss is known; where the loss decides.
    """

    step: int = 0
    next_sample: int = 0
    skipped_in_a_row: int = 0
    num_skipped: int = 0
    num_rewinds: int = 0
    num_labels: int = 0
    num_bytes: int = 0
    recent_losses: tuple[float, ...] = ()
    recent_norms: tuple[float, ...] = ()
    smoothed_loss: float | None = None
    rows: tuple[int, int] | None = None

    def updated(self, *, rows: int, num_labels: int, num_bytes: int) -> "Progress":
        """Return the progress after an update."""
        return self.model_copy(
            update={
                "step": self.step + 1,
                "next_sample": self.next_sample + rows,
                "skipped_in_a_row": 0,
                "num_labels": self.num_labels + num_labels,
                "num_bytes": self.num_bytes + num_bytes,
            }
        )

    def skipped(self, *, rows: int) -> "Progress":
        """Return the progress after a step that was skipped: only the data has moved on."""
        return self.model_copy(
            update={
                "next_sample": self.next_sample + rows,
                "skipped_in_a_row": self.skipped_in_a_row + 1,
                "num_skipped": self.num_skipped + 1,
            }
        )

    def rewound(self, checkpoint: "Progress") -> "Progress":
        """Return the progress with a checkpoint's weights and this run's next samples."""
        return checkpoint.model_copy(
            update={
                "next_sample": self.next_sample,
                "rows": self.rows,
                "num_skipped": self.num_skipped,
                "num_rewinds": self.num_rewinds + 1,
            }
        )
