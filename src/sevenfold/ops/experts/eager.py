"""The grouped matrix product by PyTorch's own operators: a loop, or grouped_mm."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.linear import linear


def loop(x: Tensor, weight: Tensor, rows_per_expert: Tensor) -> Tensor:
    """One product for each expert; reads the counts on the host."""
    counts = rows_per_expert.tolist()
    groups = zip(x.split(counts), weight, counts, strict=True)
    parts = [linear(rows, expert) for rows, expert, count in groups if count]
    if not parts:
        return x.new_zeros(0, weight.shape[1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def has_grouped_mm() -> bool:
    """Whether this PyTorch has the public grouped product."""
    return hasattr(F, "grouped_mm")


def grouped_mm(x: Tensor, weight: Tensor, rows_per_expert: Tensor) -> Tensor:
    """All experts in one call; no synchronisation with the device."""
    offsets = torch.cumsum(rows_per_expert, 0, dtype=torch.int32)
    return F.grouped_mm(x, weight.mT, offs=offsets)
