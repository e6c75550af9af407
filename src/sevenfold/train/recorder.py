"""What happens after each step: record, validation, checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sevenfold.train.batch import StepBatch
from sevenfold.train.checkpoint import run_tensors
from sevenfold.train.loop import StepOutcome, Trainer
from sevenfold.train.metrics import MetricsFile, StepRecord, finite
from sevenfold.train.progress import Progress
from sevenfold.train.saving import Saver
from sevenfold.train.speed import FlopsCounter, peak_memory_bytes
from sevenfold.train.validation import ValidationResult, bits_per_byte

OnStep = Callable[[StepRecord], None]


@dataclass(frozen=True)
class Recorder:
    """Called after every step.

    Args:
        trainer: the run.
        metrics: where every record goes; None on all ranks but the first.
        listeners: called with every record.
        validate: evaluates the model; None without validation.
        flops: counts model FLOPs.
        peak_flops: of the device, FLOP/s; None if unknown.
        saver: writes checkpoints.
    """

    trainer: Trainer
    metrics: MetricsFile | None
    listeners: tuple[OnStep, ...]
    validate: Callable[[], ValidationResult] | None
    flops: FlopsCounter
    peak_flops: float | None
    saver: Saver

    def __call__(self, outcome: StepOutcome) -> None:
        """Validate and record; save where a checkpoint is due."""
        record = self._record(outcome, self._validation(outcome))
        if self.metrics is not None:
            self.metrics.write(record)
        for listener in self.listeners:
            listener(record)
        self.saver.look()
        every = self.trainer.config.run.checkpoint_every_steps
        if outcome.fault is None and outcome.progress.step % every == 0:
            self.save(outcome.progress)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, after the record that leads up to it."""
        self.trainer.pulse.beat("saves")
        if self.metrics is not None:
            self.metrics.sync()
        trainer = self.trainer
        tensors = run_tensors(trainer.model, trainer.optimizer, trainer.layout)
        self.saver.save(tensors, progress)

    def _validation(self, outcome: StepOutcome) -> ValidationResult | None:
        settings, run = self.trainer.config.validation, self.trainer.config.run
        if settings is None or self.validate is None or outcome.fault is not None:
            return None
        step = outcome.progress.step
        due = step % settings.every_steps == 0 or step == run.steps
        if due:
            self.trainer.pulse.beat("validates")
        return self.validate() if due else None

    def _flops(self, batch: StepBatch) -> float:
        """Model FLOPs of a step, over all ranks; ranks that share rows count them once."""
        layout = self.trainer.layout
        own = self.flops.count(batch.lengths) / layout.config.context
        return layout.sum_over_tokens(torch.tensor(own, dtype=torch.float64)).item()

    def _record(self, outcome: StepOutcome, found: ValidationResult | None) -> StepRecord:
        values, batch, config = outcome.values, outcome.batch, self.trainer.config
        seq_len, has_experts = config.data.seq_len, config.model.moe is not None
        flops_per_s = self._flops(batch) / outcome.time_s
        ranks = self.trainer.layout.config.num_ranks
        summed_nats = values.loss * batch.num_labels
        return StepRecord(
            step=outcome.progress.step,
            next_sample=outcome.progress.next_sample,
            tokens=outcome.progress.next_sample * seq_len,
            loss=finite(values.loss),
            bits_per_byte=finite(bits_per_byte(summed_nats, batch.num_bytes)),
            balance_loss=finite(values.balance_loss) if has_experts else None,
            z_loss=finite(values.z_loss) if has_experts else None,
            dropped=finite(values.dropped) if has_experts else None,
            grad_norm=finite(values.grad_norm),
            lr=outcome.lr,
            skipped=outcome.fault,
            goes_back=outcome.goes_back,
            step_time_s=outcome.time_s,
            tokens_per_s=batch.num_rows * seq_len / outcome.time_s,
            flops_per_s=flops_per_s,
            mfu=flops_per_s / self.peak_flops / ranks if self.peak_flops else None,
            peak_memory_bytes=peak_memory_bytes(self.trainer.model.device),
            validation_loss=finite(found.loss) if found else None,
            validation_bits_per_byte=finite(found.bits_per_byte) if found else None,
            validation_loss_by_position=_by_name(found.by_position) if found else None,
            validation_loss_by_length=_by_name(found.by_length) if found else None,
            dropped_by_layer=tuple(map(finite, values.dropped_by_layer)) or None,
            load_by_layer=tuple(map(finite, values.load_by_layer)) or None,
        )


def _by_name(losses: dict[int, float]) -> dict[str, float | None]:
    """With keys that JSON can hold."""
    return {str(tokens): finite(loss) for tokens, loss in losses.items()}
