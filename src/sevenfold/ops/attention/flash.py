"""Packed sequences in one call of PyTorch's FlashAttention, on a GPU.

By way of PyTorch's own operator: torch.nn.attention.varlen takes grouped queries only from 2.13 on.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_WIDTH, _WIDTH_MULTIPLE = 256, 8


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why it cannot compute this, if it cannot."""
    if q.device.type != "cuda" or q.dtype not in _DTYPES:
        return f"q must be bf16 or fp16 on a GPU for impl flash, got {q.dtype} on {q.device}"
    width = q.shape[-1]
    if width != v.shape[-1] or width % _WIDTH_MULTIPLE or width > _MAX_WIDTH:
        return (
            f"D and V must be one multiple of {_WIDTH_MULTIPLE} up to {_MAX_WIDTH} for impl flash, "
            f"got {width} and {v.shape[-1]}"
        )
    return None


def packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float, window: int | None
) -> Tensor:
    """q [T, H, D] over k, v [T, G, D], T the sum of lengths; the result is [T, H, D]."""
    lengths = [length for length in lengths if length]
    if not lengths:
        return torch.zeros_like(q)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    borders = borders.pin_memory().to(q.device, non_blocking=True)
    longest = max(lengths)
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
