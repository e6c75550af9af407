"""Steps that must not count: numbers that are not finite, and spikes."""

import statistics

from sevenfold.config import TrainingError
from sevenfold.train.config import GuardSection
from sevenfold.train.progress import Progress
from sevenfold.train.step import StepValues, fault_of


def fault_in(values: StepValues, progress: Progress, guard: GuardSection) -> str | None:
    """Say why a step must be skipped; None if it need not be.

        x is a spike if x > mean + k * deviation        of the last updates' losses or norms

    Args:
        values: the step's.
        progress: before it.
        guard: the rules.

    Source: the step skipping of OLMo (6 deviations of 128 steps).
    """
    fault = fault_of(values)
    if fault is not None or guard.spike_deviations is None:
        return fault
    for name, value, recent in (
        ("loss", values.loss, progress.recent_losses),
        ("grad_norm", values.grad_norm, progress.recent_norms),
    ):
        if len(recent) < guard.spike_window:
            continue
        limit = statistics.fmean(recent) + guard.spike_deviations * statistics.pstdev(recent)
        if value > limit:
            return f"{name} {value:.4g} is a spike above {limit:.4g}"
    return None


def remembered(progress: Progress, values: StepValues, guard: GuardSection) -> Progress:
    """Return the progress with an update's loss and norm among the recent ones."""
    if guard.spike_deviations is None:
        return progress
    keep = guard.spike_window
    return progress.model_copy(
        update={
            "recent_losses": (*progress.recent_losses, values.loss)[-keep:],
            "recent_norms": (*progress.recent_norms, values.grad_norm)[-keep:],
        }
    )


def wants_rewind(progress: Progress, guard: GuardSection) -> bool:
    """Whether so many steps in a row were skipped that the run shall go back."""
    after = guard.rewind_after_skips
    return after is not None and progress.skipped_in_a_row >= after


def check_skips(progress: Progress, fault: str | None, guard: GuardSection) -> None:
    """Raise where the guard's patience ends.

    Raises:
        TrainingError: too many steps in a row were skipped, or the run would go back too often.
    """
    hint = (
        f"look at the samples before {progress.next_sample}, or start again with a lower "
        f"optimizer.lr"
    )
    if progress.skipped_in_a_row > guard.max_skipped_steps:
        raise TrainingError(
            f"at most {guard.max_skipped_steps} steps in a row must be skipped "
            f"(guard.max_skipped_steps), got {progress.skipped_in_a_row} after step "
            f"{progress.step}: {fault}; {hint}"
        )
    if wants_rewind(progress, guard) and progress.num_rewinds >= guard.max_rewinds:
        raise TrainingError(
            f"a run must go back at most {guard.max_rewinds} times (guard.max_rewinds), got "
            f"{progress.skipped_in_a_row} skipped steps again after step {progress.step}: {fault}; "
            f"{hint}"
        )
