"""The greedy choice in plain PyTorch."""

import math

import torch
from torch import Tensor


def are_finite(logits: Tensor) -> Tensor:
    """Return which rows of logits [N, V] hold numbers alone, [N] bool, in one pass."""
    return torch.linalg.vector_norm(logits, ord=math.inf, dim=-1) < math.inf


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As the public operator: tokens [N] int64 and finite [N] bool."""
    return logits.argmax(-1), are_finite(logits)
