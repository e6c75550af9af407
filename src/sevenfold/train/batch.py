"""From samples on the host to micro-batches on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sevenfold.config import TrainingError
from sevenfold.models import Batch
from sevenfold.ops import IGNORED_LABEL


class Sample(Protocol):
    """The part of a PackedSample that training reads."""

    @property
    def input_ids(self) -> np.ndarray:
        """[seq_len] int64."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """[seq_len] int64, -100 where there is no target."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, summing to seq_len."""
        ...

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes that the labels stand for."""
        ...


class SampleSource(Protocol):
    """The part of a PackedLoader that training calls; a pure function of the index."""

    def sample(self, index: int) -> Sample:
        """Return one row."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model at once.

    input_ids, labels: [B, T] on the device; documents packed into one row, or one a row.
    batch: what the tokens belong to.
    num_labels: labels that count.
    """

    input_ids: Tensor
    labels: Tensor
    batch: Batch
    num_labels: int


@dataclass(frozen=True)
class StepBatch:
    """All that one step reads; num_labels and num_bytes are known before the model runs."""

    micro_batches: tuple[MicroBatch, ...]
    num_rows: int
    num_labels: int
    num_bytes: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document of the step."""
        return tuple(n for micro in self.micro_batches for n in micro.batch.lengths)


def read_step(
    loader: SampleSource,
    first_sample: int,
    num_rows: int,
    *,
    micro_batch_rows: int | None,
    device: torch.device,
) -> StepBatch:
    """Read the samples of one step and put them on the device.

    Args:
        loader: where samples come from.
        first_sample: index of the step's first sample.
        num_rows: samples of the step.
        micro_batch_rows: samples of a micro-batch; None takes all at once.
        device: where the model lies.

    Returns:
        The micro-batches, in the samples' order.

    Raises:
        TrainingError: no sample of the step has a label.
    """
    samples = [loader.sample(first_sample + row) for row in range(num_rows)]
    size = micro_batch_rows or num_rows
    groups = [samples[at : at + size] for at in range(0, num_rows, size)]
    micro_batches = tuple(_micro_batch(group, device) for group in groups)
    num_labels = sum(micro.num_labels for micro in micro_batches)
    if num_labels == 0:
        raise TrainingError(
            f"samples {first_sample} to {first_sample + num_rows - 1} must have a label, got none"
        )
    num_bytes = sum(sample.num_bytes for sample in samples)
    return StepBatch(micro_batches, num_rows, num_labels, num_bytes)


def _micro_batch(samples: Sequence[Sample], device: torch.device) -> MicroBatch:
    input_ids = np.stack([sample.input_ids for sample in samples])
    labels = np.stack([sample.labels for sample in samples])
    num_labels = int((labels != IGNORED_LABEL).sum())
    rows, seq_len = input_ids.shape
    if all(len(sample.lengths) == 1 for sample in samples):
        batch = Batch.rows(rows, seq_len, device=device)
    else:
        batch = Batch.packed([n for sample in samples for n in sample.lengths], device=device)
        input_ids, labels = input_ids.reshape(1, -1), labels.reshape(1, -1)
    return MicroBatch(_moved(input_ids, device), _moved(labels, device), batch, num_labels)


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        # Pinned memory lets the copy run beside the step before.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
