"""int8 with one scale for each row, symmetric: rows of a state, output channels of a weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype

_LARGEST = 127
# A scale keeps 24 - 7 significant bits: 127 times it is exact in fp32, so rows that were quantised
# once come back to the same codes and the same scale.
_DROPPED_BITS = 0x7F


class Int8Rows(NamedTuple):
    """codes [..., C] int8 and scale [...] fp32; the row is codes * scale."""

    codes: Tensor
    scale: Tensor


def quantise_rows(x: Tensor) -> Int8Rows:
    """Round each row to 255 even steps.

        scale_r = max_c |x_rc| / 127, rounded up to 17 significant bits
        codes_rc = round(x_rc / scale_r)        |x - codes * scale| <= scale / 2

    Rows that dequantise_rows returned in fp32 give the same codes and scales again, bit for bit.

    Args:
        x: [..., C], fp32, bf16 or fp16. A row with a NaN or an infinity comes back as NaN.

    Returns:
        Codes in -127 to 127, and scales; a row of zeros has scale 0.

    Raises:
        TypeError: x is of another dtype.
    """
    check_dtype("x", x, (torch.float32, torch.bfloat16, torch.float16))
    x = x.float()
    peak = x.abs().amax(-1)
    # By a tensor: on a GPU PyTorch takes division by a number as a product with its reciprocal.
    exact = peak / torch.full_like(peak, _LARGEST)
    bits = (exact.view(torch.int32) + _DROPPED_BITS) & ~_DROPPED_BITS
    scale = torch.where(exact.isfinite(), bits.view(torch.float32), exact)
    step = torch.where(scale == 0, 1, scale).unsqueeze(-1)
    return Int8Rows((x / step).round().to(torch.int8), scale)


def dequantise_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return codes * scale, computed in fp32.

    Args:
        codes: [..., C] int8.
        scale: [...] fp32.
        dtype: of the result.

    Returns:
        [..., C].
    """
    return (codes * scale.unsqueeze(-1)).to(dtype)
