"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from sevenfold.config import TrainingError
from sevenfold.models import HybridModel
from sevenfold.optim import lr_multiplier
from sevenfold.parallel import Layout, Pipeline, clip_gradients
from sevenfold.parallel import gradient_norm as norm_over_ranks
from sevenfold.train.batch import ALONE, SampleSource, StepBatch, read_step
from sevenfold.train.config import RunConfig
from sevenfold.train.progress import Progress
from sevenfold.train.stages import forward_backward_by_stages
from sevenfold.train.step import (
    StepValues,
    fault_of,
    forward_backward,
    gradient_norm,
    to_host,
)


@dataclass(frozen=True)
class Trainer:
    """What stays the same throughout a run."""

    config: RunConfig
    model: HybridModel
    optimizer: torch.optim.Optimizer
    loader: SampleSource
    layout: Layout = ALONE
    pipeline: Pipeline | None = None

    def read(self, first_sample: int) -> StepBatch:
        """Read the step that begins with a sample."""
        return read_step(
            self.loader,
            first_sample,
            self.config.rows_at(first_sample),
            micro_batch_rows=self.config.batch.micro_batch_rows,
            device=self.model.device,
            layout=self.layout,
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
            group["lr"] = lr
        self.optimizer.step()


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; progress is the one after it, fault says why it was skipped."""

    progress: Progress
    values: StepValues
    batch: StepBatch
    lr: float
    fault: str | None
    time_s: float


def train_steps(
    trainer: Trainer,
    progress: Progress,
    *,
    after_step: Callable[[StepOutcome], None],
    stop: Callable[[], bool],
) -> Progress:
    """Take steps until the run is complete or asked to stop.

    A step whose loss or gradient is not finite leaves weights, moments and schedule as they were:
    the run goes on as if its samples did not exist.

    Args:
        trainer: model, optimizer and data.
        progress: where the run stands.
        after_step: called after every step, skipped ones included.
        stop: asked before every step.

    Returns:
        Where the run stands now.

    Raises:
        TrainingError: more than guard.max_skipped_steps steps in a row were skipped.
    """
    trainer.model.train()
    batch = trainer.read(progress.next_sample)
    while progress.step < trainer.config.run.steps and not trainer.layout.agree(stop()):
        began = time.perf_counter()
        losses, norm = trainer.forward_backward(batch), trainer.gradient_norm()
        # Read ahead while a GPU works; what comes next does not depend on this step's outcome.
        upcoming = trainer.read(progress.next_sample + batch.num_rows)
        values = to_host(trainer.model, losses, norm)
        fault, lr = fault_of(values), trainer.lr(progress.step)
        if fault is None:
            trainer.update(norm, values, lr)
        trainer.optimizer.zero_grad(set_to_none=True)
        progress = _advanced(progress, batch, fault)
        time_s = time.perf_counter() - began
        after_step(StepOutcome(progress, values, batch, lr, fault, time_s))
        _check_guard(trainer.config.guard.max_skipped_steps, progress, fault)
        batch = upcoming
    return progress


def _advanced(progress: Progress, batch: StepBatch, fault: str | None) -> Progress:
    if fault is not None:
        return progress.skipped(rows=batch.num_rows)
    return progress.updated(
        rows=batch.num_rows, num_labels=batch.num_labels, num_bytes=batch.num_bytes
    )


def _check_guard(max_skipped_steps: int, progress: Progress, fault: str | None) -> None:
    if progress.skipped_in_a_row > max_skipped_steps:
        raise TrainingError(
            f"at most {max_skipped_steps} steps in a row must be skipped (guard.max_skipped_steps)"
            f", got {progress.skipped_in_a_row} after step {progress.step}: {fault}; look at the "
            f"samples before {progress.next_sample}, or start again with a lower optimizer.lr"
        )
