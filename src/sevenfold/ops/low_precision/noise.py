"""Random bits that depend on what they are for, and on nothing else: no generator, no order."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))


@dataclass(frozen=True)
class Noise:
    """What the random bits of N sequences in one layer are for.

    key: [N] int64, the sequence's seed. position: [N] int64, its tokens so far. layer: its index.
    """

    key: Tensor
    position: Tensor
    layer: int


def noise_bits(noise: Noise, shape: tuple[int, ...]) -> Tensor:
    """Return 32 random bits for each element of each sequence's state.

        bits_ni = mix(mix(i) ^ seed_n),  seed_n = mix(mix(mix(key_n) ^ position_n) ^ layer)

    So a sequence's bits are the same in every run, in any batch, in any slot.

    Args:
        noise: of N sequences.
        shape: of one sequence's state.

    Returns:
        [N, *shape] int64, 0 to 2^32 - 1.

    Source: mix is C. Wellons' lowbias32, an integer hash of 32 bits without visible bias.
    """
    key = noise.key
    seed = _mix(_mix(key & _MASK) ^ ((key >> 32) & _MASK))
    seed = _mix(_mix(seed ^ (noise.position & _MASK)) ^ noise.layer)
    count = torch.Size(shape).numel()
    element = _mix(torch.arange(count, device=key.device))
    return _mix(seed[:, None] ^ element).view(len(key), *shape)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers; products wrap at 64 bits, which leaves the lower 32 right."""
    for shift, factor in _STEPS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 16)
