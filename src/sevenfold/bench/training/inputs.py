"""Rows of random tokens in place of a dataset, and the run that trains on them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sevenfold.bench.training.cases import Case
from sevenfold.optim import OptimizerConfig
from sevenfold.train import RunConfig
from sevenfold.train.config import (
    BatchSection,
    CheckpointingSection,
    DataSection,
    PrecisionSection,
    RunSection,
)

_NO_END = 10**9  # steps: the benchmark stops by itself


@dataclass(frozen=True)
class RandomSample:
    """One row, as training reads it."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: tuple[int, ...]
    num_bytes: int
    num_padding_tokens: int = 0


@dataclass(frozen=True)
class RandomRows:
    """A source of rows of one document each; always the same row for an index."""

    vocab_size: int
    tokens: int

    def sample(self, index: int) -> RandomSample:
        """Return one row."""
        ids = np.random.default_rng(index).integers(0, self.vocab_size, self.tokens + 1)
        return RandomSample(ids[:-1], ids[1:], (self.tokens,), self.tokens)


def run_config(case: Case, device: torch.device) -> RunConfig:
    """Return the run file of a case: on a GPU bf16 products and stream, on a CPU fp32."""
    bf16 = "bf16" if device.type == "cuda" else None
    return RunConfig(
        run=RunSection(out=Path("unused"), steps=_NO_END, device=str(device)),
        data=DataSection(path=Path("unused"), seq_len=case.tokens),
        model=case.config,
        optimizer=OptimizerConfig(lr=1e-5),
        batch=BatchSection(tokens_per_step=case.rows * case.tokens),
        precision=PrecisionSection(autocast=bf16, stream=bf16),
        checkpointing=CheckpointingSection(every_layers=1 if case.recompute else None),
    )
