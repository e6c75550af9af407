"""Decoding as the recurrence reads: one sequence after another, any dtype."""

import torch
from torch import Tensor


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator."""
    decay = torch.exp(log_decay.to(pool.dtype))[:, None, None]
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        q_HK, k_HK, v_HV = (x[b].to(pool.dtype) for x in (q, k, v))
        pool[slot] = decay * pool[slot] + k_HK[:, :, None] * v_HV[:, None, :]
        o[b] = scale * torch.einsum("hk,hkv->hv", q_HK, pool[slot])
    return o
