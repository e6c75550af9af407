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


def advance_rows(
    logits: Tensor, chosen: Tensor, places: Tensor, pages: Tensor, page_tokens: int
) -> None:
    """As the public operator."""
    chosen[:, 0], chosen[:, 1] = greedy_tokens(logits)
    position, page, place, key_lengths = places
    is_real = key_lengths > 0
    position += is_real
    key_lengths += is_real
    block = (position // page_tokens).clamp(max=pages.shape[1] - 1)
    page.copy_(torch.where(is_real, pages.gather(1, block[:, None]).squeeze(1), page))
    place.copy_(torch.where(is_real, position % page_tokens, place))
