"""fp8 (e4m3) with one scale for each row, symmetric: channels of a weight, tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0


class Fp8Rows(NamedTuple):
    """codes [..., C] float8_e4m3fn and scale [...] fp32; the row is codes * scale."""

    codes: Tensor
    scale: Tensor


def quantise_rows_fp8(x: Tensor) -> Fp8Rows:
    """Round each row to fp8 under a scale of its own.

        scale_r = max_c |x_rc| / 448
        codes_rc = x_rc / scale_r, rounded to 4 significant bits    |x - codes * scale| <= |x| / 16

    Below 2^-6 of a scale the error is absolute, up to 2^-10 of the scale.

    Args:
        x: [..., C], fp32, bf16 or fp16. A row with a NaN or an infinity comes back as NaN.

    Returns:
        Codes and scales; a row of zeros has scale 0.

    Raises:
        TypeError: x is of another dtype.

    Source: the format is that of arXiv 2209.05433.
    """
    check_dtype("x", x, (torch.float32, torch.bfloat16, torch.float16))
    x = x.float()
    peak = x.abs().amax(-1)
    # By a tensor: on a GPU PyTorch takes division by a number as a product with its reciprocal.
    scale = peak / torch.full_like(peak, LARGEST_FP8)
    step = torch.where(scale == 0, 1, scale).unsqueeze(-1)
    return Fp8Rows((x / step).to(FP8), scale)
