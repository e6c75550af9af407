"""Loss and bits per byte on samples that training never reads, also by position and length."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sevenfold.models import HybridModel
from sevenfold.ops import IGNORED_LABEL
from sevenfold.parallel import Layout, Pipeline, release_weights
from sevenfold.train.batch import ALONE, MicroBatch, SampleSource, StepBatch, read_step
from sevenfold.train.pipeline_step import read_by_stages
from sevenfold.train.step import autocast_context

# Tokens below 256 are one bucket; then each doubling is one.
_FIRST_BUCKET_TOKENS = 256
_MAX_BUCKETS = 32


@dataclass(frozen=True)
class ValidationResult:
    """Mean cross-entropy in nats, and the same in bits per UTF-8 byte.

    by_position: mean loss of the tokens at positions from a bucket's first on in their document, as
        a row holds it; buckets begin at 0, 256, 512, 1,024 ...
    by_length: mean loss of the documents of so many tokens or more, by the same buckets.
    """

    loss: float
    bits_per_byte: float
    by_position: dict[int, float] = field(default_factory=dict)
    by_length: dict[int, float] = field(default_factory=dict)


def bits_per_byte(summed_nats: float, num_bytes: int) -> float:
    """Return a summed cross-entropy in bits per byte, which no tokenizer changes.

    bits_per_byte = nats / (ln 2 * bytes)
    """
    return summed_nats / (math.log(2) * num_bytes)


def validate(
    model: HybridModel,
    loader: SampleSource,
    num_samples: int,
    *,
    micro_batch_rows: int | None,
    autocast: str | None,
    layout: Layout = ALONE,
    pipeline: Pipeline | None = None,
) -> ValidationResult:
    """Evaluate a model on the first samples of a loader.

    Args:
        model: put into evaluation for the while: its experts drop nothing.
        loader: of the validation split.
        num_samples: rows, from index 0.
        micro_batch_rows: rows at once; None takes all.
        autocast: "bf16" or None.
        layout: where this rank stands; all ranks take part.
        pipeline: of a rank that holds stages of the model.

    Returns:
        Loss over all labels, its parts, and bits per byte.
    """
    step = read_step(
        loader,
        0,
        num_samples,
        micro_batch_rows=micro_batch_rows,
        device=model.device,
        layout=layout,
    )
    was_training = model.training
    model.eval()
    found = _losses_of_step(model, pipeline, step, autocast)
    model.train(was_training)
    release_weights(model)
    sums, counts = layout.sum_over_shares(found).cpu().numpy()
    summed = float(sums.sum())
    return ValidationResult(
        summed / step.num_labels,
        bits_per_byte(summed, step.num_bytes),
        _means(sums.sum(1), counts.sum(1)),
        _means(sums.sum(0), counts.sum(0)),
    )


@torch.no_grad()
def _losses_of_step(
    model: HybridModel, pipeline: Pipeline | None, step: StepBatch, autocast: str | None
) -> Tensor:
    """[2, positions, lengths] fp64: this rank's summed loss and labels of each pair of buckets."""
    found = torch.zeros(2, _MAX_BUCKETS, _MAX_BUCKETS, dtype=torch.float64, device=model.device)

    def add(hidden: Tensor, micro: MicroBatch) -> None:
        _add_losses(found, model, hidden.flatten(0, 1), micro)

    if pipeline is not None:
        read_by_stages(model, pipeline, step, add, autocast=autocast)
        return found
    for micro in step.micro_batches:
        with autocast_context(model.device, autocast):
            add(model.hidden(micro.input_ids, micro.batch).hidden, micro)
    return found


def _add_losses(found: Tensor, model: HybridModel, hidden: Tensor, micro: MicroBatch) -> None:
    positions, lengths = (_buckets(x) for x in micro.places())
    cells = positions * _MAX_BUCKETS + lengths
    labels = micro.labels.flatten()
    for cell in np.unique(cells).tolist():
        # Each token goes through the head once, whatever the number of buckets.
        members = torch.from_numpy(np.flatnonzero(cells == cell)).to(model.device)
        chosen = labels[members]
        at = divmod(cell, _MAX_BUCKETS)
        found[(0, *at)] += model.cross_entropy(hidden[members], chosen)
        found[(1, *at)] += (chosen != IGNORED_LABEL).sum()


def _buckets(tokens: np.ndarray) -> np.ndarray:
    """0 below 256 tokens, 1 from 256, 2 from 512, 3 from 1,024 ..."""
    halves = np.maximum(tokens // _FIRST_BUCKET_TOKENS, 0)
    return np.where(halves == 0, 0, np.log2(np.maximum(halves, 1)).astype(np.int64) + 1)


def _means(sums: np.ndarray, counts: np.ndarray) -> dict[int, float]:
    first = [0, *(_FIRST_BUCKET_TOKENS << i for i in range(_MAX_BUCKETS - 1))]
    return {
        tokens: float(total / count)
        for tokens, total, count in zip(first, sums, counts, strict=True)
        if count
    }
