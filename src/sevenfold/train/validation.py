"""Loss and bits per byte on samples that training never reads."""

import math
from dataclasses import dataclass

import torch

from sevenfold.models import HybridModel
from sevenfold.parallel import Layout, Pipeline, release_weights
from sevenfold.train.batch import ALONE, SampleSource, read_step
from sevenfold.train.stages import losses_by_stages
from sevenfold.train.step import micro_batch_loss


@dataclass(frozen=True)
class ValidationResult:
    """Mean cross-entropy in nats, and the same in bits per UTF-8 byte."""

    loss: float
    bits_per_byte: float


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
        Loss over all labels, and bits per byte.
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
    if pipeline is None:
        loss = sum(
            micro_batch_loss(model, micro, autocast=autocast) for micro in step.micro_batches
        )
    else:
        loss = losses_by_stages(model, pipeline, step, autocast=autocast)
    model.train(was_training)
    release_weights(model)
    summed = layout.sum_over_shares(torch.as_tensor(loss)).item()
    return ValidationResult(summed / step.num_labels, bits_per_byte(summed, step.num_bytes))
