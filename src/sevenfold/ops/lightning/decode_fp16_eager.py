"""Decoding over states in fp16 in plain PyTorch: taken out in fp32, advanced, rounded, put back."""

import torch
from torch import Tensor

from sevenfold.ops.lightning import decode_eager
from sevenfold.ops.low_precision import (
    Noise,
    ScaledFp16,
    from_scaled_fp16,
    noise_bits,
    to_scaled_fp16,
)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: ScaledFp16,
    slots: Tensor,
    noise: Noise,
    scale: float,
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator."""
    rows = (slots >= 0).nonzero().squeeze(1)
    at, own = slots[rows].long(), torch.full_like(slots, -1)
    own[rows] = torch.arange(len(rows), device=slots.device, dtype=slots.dtype)
    states = from_scaled_fp16(pool.codes[at], pool.scale[at])
    o = decode_eager.decode(q, k, v, log_decay, states, own, scale)
    noise = Noise(noise.key[rows], noise.position[rows], noise.layer)
    held = to_scaled_fp16(states, noise_bits(noise, tuple(states.shape[1:])))
    pool.codes[at], pool.scale[at] = held
    return o
