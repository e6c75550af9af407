"""Validation of a model that ranks divide, on rows whose documents fall into several buckets."""

from dataclasses import dataclass

import numpy as np
import torch
from parallel_helpers import Case, Row, build

from sevenfold.parallel import Layout, Pipeline
from sevenfold.train.validation import ValidationResult, validate

NUM_ROWS = 4
# Of 640 tokens each: documents of less than 256, of less than 512, and more.
LENGTHS = ((640,), (300, 340), (250, 390), (10, 520, 110))
CASES = tuple(
    Case(name, parallel, model={"sliding_window": 40})
    for name, parallel in (
        ("shard", {"shard": 2}),
        ("context", {"context": 2}),
        ("ring", {"context": 2, "context_attention": "ring"}),
        ("tensor", {"tensor": 2}),
        ("pipeline", {"pipeline": 2}),
    )
)


@dataclass(frozen=True)
class LongRows:
    """Rows by index, of which some tokens have no label."""

    def sample(self, index: int) -> Row:
        lengths = LENGTHS[index]
        ids, labels = np.random.default_rng(index).integers(0, 64, size=(2, sum(lengths)))
        labels[:: 7 + index] = -100
        return Row(ids, labels, lengths, num_bytes=900)


def validated(case: Case, layout: Layout, dtype: torch.dtype) -> ValidationResult:
    model, _ = build(case, layout, dtype)
    pipeline = Pipeline(model, layout, stream=dtype) if layout.config.pipeline > 1 else None
    return validate(
        model,
        LongRows(),
        NUM_ROWS,
        micro_batch_rows=2,
        autocast=None,
        layout=layout,
        pipeline=pipeline,
    )
