"""From samples on the host to micro-batches on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sevenfold.config import DataError, TrainingError
from sevenfold.models import Batch
from sevenfold.models.padding import Padding
from sevenfold.ops import IGNORED_LABEL
from sevenfold.parallel import Layout, ParallelConfig, divide_row
from sevenfold.parallel.context.batch import ContextBatch

# Of a run of one process.
ALONE = Layout(ParallelConfig())


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
    def num_padding_tokens(self) -> int:
        """Tokens at the row's end that are padding, a document of their own."""
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
    """Rows that go through the model at once, or what one rank holds of them.

    input_ids, labels: [B, T] on the device; documents packed into one row, or one a row.
    batch: what the tokens belong to.
    lengths: tokens of each document of the rank's rows, of whose tokens context ranks have parts.
    num_labels: labels that count, over all ranks.
    """

    input_ids: Tensor
    labels: Tensor
    batch: Batch
    lengths: tuple[int, ...]
    num_labels: int

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each token's position in its document, and the document's tokens: [B * T]."""
        lengths = np.array(self.lengths)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        found = np.arange(len(starts)) - starts, np.repeat(lengths, lengths)
        if not isinstance(self.batch, ContextBatch):
            return found
        position, tokens = ([x[own] for own in self.batch.slices] for x in found)
        return np.concatenate(position), np.concatenate(tokens)


@dataclass(frozen=True)
class StepBatch:
    """All that one step reads; numbers are over all ranks and known before the model runs."""

    micro_batches: tuple[MicroBatch, ...]
    num_rows: int
    num_labels: int
    num_bytes: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document of the step's rows that this rank reads."""
        return tuple(n for micro in self.micro_batches for n in micro.lengths)


def read_step(
    loader: SampleSource,
    first_sample: int,
    num_rows: int,
    *,
    micro_batch_rows: int | None,
    device: torch.device,
    layout: Layout = ALONE,
    arrived: Callable[[], None] = lambda: None,
) -> StepBatch:
    """Read this rank's samples of one step and put them on the device.

    Every micro-batch is divided among the ranks, so that its rows are the same in all layouts.

    Args:
        loader: where samples come from.
        first_sample: index of the step's first sample.
        num_rows: samples of the step.
        micro_batch_rows: samples of a micro-batch; None takes all at once.
        device: where the model lies.
        layout: where this rank stands.
        arrived: called when this rank has read its samples and waits for the others.

    Returns:
        The micro-batches, in the samples' order.

    Raises:
        TrainingError: no sample of the step has a label.
        DataError: this rank, or another, cannot read a sample; all ranks raise it.
    """
    size = micro_batch_rows or num_rows
    groups = [range(at, min(at + size, num_rows)) for at in range(0, num_rows, size)]
    parts = [[first_sample + row for row in _part(rows, layout)] for rows in groups]
    own = _read_all(loader, parts, layout, arrived)
    micro_batches = [_micro_batch(samples, device, layout) for samples in own]
    num_bytes = sum(sample.num_bytes for samples in own for sample in samples)
    # Ranks that share rows count their bytes once.
    counts = [micro.num_labels for micro in micro_batches]
    counts.append(num_bytes if layout.place.context == 0 else 0)
    *labels, num_bytes = layout.sum_over_tokens(torch.tensor(counts)).tolist()
    if sum(labels) == 0:
        raise TrainingError(
            f"samples {first_sample} to {first_sample + num_rows - 1} must have a label, got none"
        )
    counted = [replace(m, num_labels=n) for m, n in zip(micro_batches, labels, strict=True)]
    return StepBatch(tuple(counted), num_rows, sum(labels), num_bytes)


def _read_all(
    loader: SampleSource, parts: list[list[int]], layout: Layout, arrived: Callable[[], None]
) -> list[list[Sample]]:
    """This rank's samples; where one rank fails, none goes on to wait for it."""
    own: list[list[Sample]] = []
    error: DataError | None = None
    try:
        own = [[loader.sample(index) for index in part] for part in parts]
    except DataError as caught:
        error = caught
    arrived()
    failed = layout.agree(error is not None)
    if error is not None:
        raise error
    if failed:
        raise DataError(
            "every rank must read its samples, got an error on another rank: see its output"
        )
    return own


def _part(rows: range, layout: Layout) -> range:
    """The rows of a micro-batch that a rank reads."""
    size = len(rows) // layout.config.data
    return rows[layout.place.data * size :][:size]


def _micro_batch(samples: Sequence[Sample], device: torch.device, layout: Layout) -> MicroBatch:
    input_ids = np.stack([sample.input_ids for sample in samples])
    labels = np.stack([sample.labels for sample in samples])
    lengths = tuple(n for sample in samples for n in sample.lengths)
    rows, seq_len = input_ids.shape
    if layout.config.context > 1:
        batch = divide_row(lengths, layout.config.context, layout.place.context, device=device)
        parts = ([x.reshape(1, -1)[:, own] for own in batch.slices] for x in (input_ids, labels))
        input_ids, labels = (np.concatenate(part, 1) for part in parts)
    elif len(lengths) == rows:
        batch = Batch.rows(rows, seq_len, device=device)
    else:
        batch = Batch.packed(lengths, device=device)
        input_ids, labels = input_ids.reshape(1, -1), labels.reshape(1, -1)
    num_labels = int((labels != IGNORED_LABEL).sum())
    ids, targets = (_moved(np.ascontiguousarray(x), device) for x in (input_ids, labels))
    batch = replace(batch, padding=_padding(samples, batch))
    return MicroBatch(ids, targets, batch, lengths, num_labels)


def _padding(samples: Sequence[Sample], batch: Batch) -> Padding | None:
    """The padding of samples, of which the batch may be one rank's part."""
    behind = np.array([sample.num_padding_tokens for sample in samples])
    if not behind.any():
        return None
    seq_len = len(samples[0].input_ids)
    is_padding = np.arange(seq_len) >= seq_len - behind[:, None]
    if isinstance(batch, ContextBatch):
        is_padding = np.concatenate([is_padding.reshape(-1)[own] for own in batch.slices])
    return Padding.at(is_padding)


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        # Pinned memory lets the copy run beside the step before.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
