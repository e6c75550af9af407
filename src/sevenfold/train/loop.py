"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from sevenfold.config import DataError, TrainingError
from sevenfold.models import HybridModel
from sevenfold.optim import lr_multiplier
from sevenfold.parallel import Layout, Pipeline, clip_gradients
from sevenfold.parallel import gradient_norm as norm_over_ranks
from sevenfold.train.batch import ALONE, SampleSource, StepBatch, read_step
from sevenfold.train.batch_size import next_rows, rows_now, with_rows
from sevenfold.train.config import RunConfig
from sevenfold.train.guard import check_skips, fault_in, remembered, wants_rewind
from sevenfold.train.pipeline_step import forward_backward_by_stages
from sevenfold.train.progress import Progress
from sevenfold.train.pulse import SILENT, WAITS, Pulse
from sevenfold.train.step import StepValues, forward_backward, gradient_norm, to_host


@dataclass(frozen=True)
class Trainer:
    """What stays the same throughout a run."""

    config: RunConfig
    model: HybridModel
    optimizer: torch.optim.Optimizer
    loader: SampleSource
    layout: Layout = ALONE
    pipeline: Pipeline | None = None
    pulse: Pulse = SILENT

    def read(self, first_sample: int, rows: int | None = None) -> StepBatch:
        """Read the step that begins with a sample; None takes the run file's number of rows."""
        self.pulse.beat("reads")
        return read_step(
            self.loader,
            first_sample,
            rows or self.config.rows_at(first_sample),
            micro_batch_rows=self.config.batch.micro_batch_rows,
            device=self.model.device,
            layout=self.layout,
            arrived=lambda: self.pulse.beat(WAITS),
        )

    def lr(self, step: int) -> float:
        """Return the learning rate of the update after `step` others."""
        share = lr_multiplier(self.config.schedule, step, self.config.run.steps)
        return self.config.optimizer.lr * share

    def forward_backward(self, batch: StepBatch) -> Tensor:
        """Accumulate gradients; the losses as forward_backward returns them, over all ranks."""
        autocast = self.config.precision.autocast
        if self.pipeline is None:
            losses = forward_backward(self.model, batch, autocast=autocast)
        else:
            losses = forward_backward_by_stages(self.model, self.pipeline, batch, autocast=autocast)
        return self.layout.sum_over_shares(losses)

    def gradient_norm(self) -> Tensor:
        """Return the global norm of the gradients, the same on all ranks."""
        if self.layout.is_alone:
            return gradient_norm(self.model.parameters())
        return norm_over_ranks(self.model.named_parameters(), self.layout)

    def update(self, norm: Tensor, values: StepValues, lr: float) -> None:
        """Clip the gradients and move the weights."""
        limit = self.config.optimizer.max_grad_norm
        # Decided on the host, which knows the norm: most steps of a settled run need no pass.
        if limit is not None and values.grad_norm > limit:
            clip = clip_grads_with_norm_ if self.layout.is_alone else clip_gradients
            clip(self.model.parameters(), limit, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; progress is the one after it, fault says why it was skipped.

    goes_back: whether the run goes on from its newest checkpoint's weights.
    """

    progress: Progress
    values: StepValues
    batch: StepBatch
    lr: float
    fault: str | None
    time_s: float
    goes_back: bool = False


def train_steps(
    trainer: Trainer,
    progress: Progress,
    *,
    after_step: Callable[[StepOutcome], None],
    stop: Callable[[], bool],
    rewind: Callable[[], Progress | None] = lambda: None,
) -> Progress:
    """Take steps until the run is complete or asked to stop.

    A step whose loss or gradient is not finite, or a spike where the guard looks for some, leaves
    weights, moments and schedule as they were: the run goes on as if its samples did not exist.
    After so many in a row as the guard says it goes back to a checkpoint, past those samples.

    Args:
        trainer: model, optimizer and data.
        progress: where the run stands.
        after_step: called after every step, skipped ones included.
        stop: asked before every step.
        rewind: puts the newest checkpoint's weights and moments back and returns its counters;
            None if there is no checkpoint.

    Returns:
        Where the run stands now.

    Raises:
        TrainingError: more than guard.max_skipped_steps steps in a row were skipped, or the run
            went back more than guard.max_rewinds times.
        UnreadError: samples cannot be read; the step before them is done.
    """
    trainer.model.train()
    config, guard = trainer.config, trainer.config.guard
    progress = with_rows(progress, config)
    if progress.step == config.run.steps:
        return progress
    batch = trainer.read(progress.next_sample, rows_now(progress))
    while not trainer.layout.agree(stop()):
        began = time.perf_counter()
        trainer.pulse.beat("computes", progress.step)
        losses, norm = trainer.forward_backward(batch), trainer.gradient_norm()
        # Read ahead while a GPU works; what comes next does not depend on this step's outcome.
        upcoming = _read_ahead(trainer, progress, batch)
        trainer.pulse.beat(WAITS)
        values = to_host(trainer.model, losses, norm)
        trainer.pulse.beat("updates")
        fault, lr = fault_in(values, progress, guard), trainer.lr(progress.step)
        if fault is None:
            trainer.update(norm, values, lr)
        trainer.optimizer.zero_grad(set_to_none=True)
        progress = _advanced(progress, batch, values, fault, config)
        time_s = time.perf_counter() - began
        goes_back = fault is not None and wants_rewind(progress, guard)
        after_step(StepOutcome(progress, values, batch, lr, fault, time_s, goes_back))
        check_skips(progress, fault, guard)
        if goes_back:
            progress = _gone_back(progress, rewind())
        if progress.step == config.run.steps:
            break
        if upcoming is None:  # the last step was skipped, and comes again with other samples
            upcoming = _read(trainer, progress.next_sample, rows_now(progress))
        if isinstance(upcoming, DataError):
            raise UnreadError(progress, upcoming)
        batch = upcoming
    return progress


class UnreadError(Exception):
    """Samples that cannot be read, and where the run stands before them."""

    def __init__(self, progress: Progress, cause: DataError) -> None:
        super().__init__(str(cause))
        self.progress, self.cause = progress, cause


def _read_ahead(
    trainer: Trainer, progress: Progress, batch: StepBatch
) -> StepBatch | DataError | None:
    """The next step's samples, None after the last; an error waits until this step is done."""
    if progress.step + 1 == trainer.config.run.steps:
        return None  # what lies behind the end may be bad: that is not this run's matter
    rows = None if progress.rows is None else progress.rows[1]
    return _read(trainer, progress.next_sample + batch.num_rows, rows)


def _read(trainer: Trainer, first_sample: int, rows: int | None) -> StepBatch | DataError:
    try:
        return trainer.read(first_sample, rows)
    except DataError as error:
        return error


def _advanced(
    progress: Progress, batch: StepBatch, values: StepValues, fault: str | None, config: RunConfig
) -> Progress:
    if fault is not None:
        return next_rows(progress.skipped(rows=batch.num_rows), None, config)
    after = progress.updated(
        rows=batch.num_rows, num_labels=batch.num_labels, num_bytes=batch.num_bytes
    )
    return next_rows(remembered(after, values, config.guard), values.loss, config)


def _gone_back(progress: Progress, checkpoint: Progress | None) -> Progress:
    if checkpoint is None:
        raise TrainingError(
            f"guard.rewind_after_skips must have a checkpoint to go back to, got none after "
            f"{progress.skipped_in_a_row} skipped steps at step {progress.step}; lower "
            f"run.checkpoint_every_steps"
        )
    return progress.rewound(checkpoint)
