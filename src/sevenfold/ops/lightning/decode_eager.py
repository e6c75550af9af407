"""Decoding in plain PyTorch: all sequences at once, their states gathered and written back."""

import torch
from torch import Tensor


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator."""
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    rows = (slots >= 0).nonzero().squeeze(1)
    taken = slots[rows]
    q_, k_, v_ = (x[rows].to(pool.dtype) for x in (q, k, v))
    decay = torch.exp(log_decay.to(pool.dtype))[:, None, None]
    state = torch.addcmul(pool[taken] * decay, k_.unsqueeze(-1), v_.unsqueeze(-2))
    pool[taken] = state
    o[rows] = (scale * (q_.unsqueeze(-2) @ state).squeeze(-2)).to(v.dtype)
    return o
