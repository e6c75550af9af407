"""fp16 with one power of two for each matrix, rounded to nearest or stochastically."""

from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape

_TOP_EXPONENT = 15  # the largest element is scaled to below 2^15: nothing overflows
_LEAST_EXPONENT = -126  # of a normal fp32 scale
_DROPPED_BITS = 0x1FFF  # 13 of fp32's 24 significant bits have no place in fp16's 11
_ROUNDS_UP = 1 - 2**-12  # a mantissa in [0.5, 1) from here on rounds to 1 in fp16


class ScaledFp16(NamedTuple):
    """codes [..., K, V] fp16 and scale [...] fp32, a power of two; the matrix is codes * scale."""

    codes: Tensor
    scale: Tensor


def to_scaled_fp16(x: Tensor, bits: Tensor | None = None) -> ScaledFp16:
    """Round each matrix to fp16 under a scale of its own.

        scale = 2^(e - 15), 2^e the least power of two above max |x| once that is rounded
        codes = x / scale, rounded to 11 significant bits

    The relative error of an element is at most 2^-11 rounded to nearest, 2^-10 stochastically;
    below 2^-29 of the largest element it is absolute. Stochastic rounding gives each neighbour with
    the probability that makes the mean x (elements below 2^-29 of the largest apart). What
    from_scaled_fp16 returned gives the same codes and scales again, whatever the bits (codes of
    less than 2^-28 of the largest apart).

    Args:
        x: [..., K, V] fp32; a NaN stays where it is.
        bits: [..., K, V] int64, random, of which the lowest 13 are used; None rounds to nearest.

    Returns:
        Codes and scales.

    Raises:
        TypeError: x is not fp32.
        ValueError: bits are not one for each element.

    Source: stochastic rounding of a sum that small terms enter, arXiv 1502.02551.
    """
    check_dtype("x", x, (torch.float32,))
    peak = x.abs().amax((-2, -1))
    mantissa, exponent = torch.frexp(peak)
    exponent = exponent + (mantissa >= _ROUNDS_UP) - _TOP_EXPONENT
    scale = torch.ldexp(torch.ones_like(peak), exponent.clamp(min=_LEAST_EXPONENT))
    scale = torch.where(peak.isfinite(), scale, 1.0)
    scaled = x / scale[..., None, None]
    if bits is not None:
        check_shape("bits", bits, x.shape, "[..., K, V]")
        scaled = _rounded(scaled, bits)
    return ScaledFp16(scaled.half(), scale)


def from_scaled_fp16(codes: Tensor, scale: Tensor) -> Tensor:
    """Return codes * scale in fp32, exactly.

    Args:
        codes: [..., K, V] fp16.
        scale: [...] fp32.

    Returns:
        [..., K, V] fp32.
    """
    return codes.float() * scale[..., None, None]


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    """x with 11 significant bits: it goes up where a random number reaches the bits that it drops.

    Adding to the bits of a float adds to its magnitude, and carries into its exponent rightly.
    """
    raised = x.view(torch.int32) + (bits & _DROPPED_BITS).int()
    return torch.where(x.isfinite(), (raised & ~_DROPPED_BITS).view(torch.float32), x)
