"""States at borders by plain products, some tokens at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# What has decayed by more is 0: the smallest number that fp32 holds with all its digits.
LEAST = torch.finfo(torch.float32).tiny
# Channels of the decayed rows that exist at once.
_BLOCK_ELEMENTS = 2**25


def added(
    a: Tensor, b: Tensor, log_decay: Tensor, spans: Sequence[tuple[int, int]], from_end: bool
) -> Tensor:
    """Arguments and result as lightning_added's."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    states = a.new_zeros(len(spans), *a.shape[1:], b.shape[2], dtype=dtype)
    for state, span in zip(states, spans, strict=True):
        for tokens, weights in _blocks(span, b, log_decay, from_end):
            faded = (b[tokens] * weights).to(b.dtype)
            state += torch.einsum("thk,thv->hkv", a[tokens].to(dtype), faded.to(dtype))
    return states


def add_read(
    y: Tensor,
    x: Tensor,
    states: Tensor,
    log_decay: Tensor,
    spans: Sequence[tuple[int, int]],
    from_end: bool,
) -> None:
    """Arguments as lightning_add_read's."""
    for state, span in zip(states, spans, strict=True):
        rounded = state.to(x.dtype).to(state.dtype)
        for tokens, weights in _blocks(span, x, log_decay, from_end):
            read = torch.einsum("thk,hkv->thv", x[tokens].to(state.dtype), rounded)
            y[tokens] += (read * weights).to(y.dtype)


def _blocks(
    span: tuple[int, int], x: Tensor, log_decay: Tensor, from_end: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Tokens of a block, and their weights [tokens, H, 1]."""
    start, length = span
    size = max(1, _BLOCK_ELEMENTS // (x.shape[1] * x.shape[2]))
    dtype = torch.promote_types(x.dtype, torch.float32)
    for first in range(0, length, size):
        places = torch.arange(first, min(first + size, length), device=x.device)
        distance = length - 1 - places if from_end else places + 1
        weights = torch.exp(distance[:, None] * log_decay.to(dtype))
        tokens = slice(start + first, start + first + len(places))
        yield tokens, (weights * (weights >= LEAST))[..., None]
