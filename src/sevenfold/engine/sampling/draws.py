"""Random numbers that depend on a request's seed and the token's place alone.

Whatever else is in the batch, and however often a request was preempted, its draws are the same.
"""

from torch import Tensor

# splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def uniform(seeds: Tensor, places: Tensor) -> Tensor:
    """Draw one number for each request.

        u = mix(seed + (place + 1) * gamma) / 2^64, the upper 53 bits

    Args:
        seeds: [N] int64, all 64 bits count.
        places: [N] int64, how many tokens the output has.

    Returns:
        [N] fp64 in [0, 1), on the device of seeds; nothing waits for it.
    """
    x = mixed(mixed(seeds) + (places + 1) * _signed(_GAMMA))
    return _shifted(x, 11).double() * 2.0**-53


def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every bit of the result depends on every bit of x, int64."""
    for multiplier, shift in zip(_MULTIPLIERS, _SHIFTS, strict=False):
        x = (x ^ _shifted(x, shift)) * _signed(multiplier)
    return x ^ _shifted(x, _SHIFTS[-1])


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x shifted right without its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits
