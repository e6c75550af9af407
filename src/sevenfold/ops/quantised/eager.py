"""Products with 8-bit weights in plain PyTorch: what they mean, on any device."""

from torch import Tensor

from sevenfold.ops.linear import linear
from sevenfold.ops.low_precision import dequantise_rows, quantise_rows_fp8
from sevenfold.ops.precision import full_precision


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The product; arguments and result as in the public operator."""
    return linear(x, dequantise_rows(codes, scale, x.dtype))


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The product; arguments and result as in the public operator."""
    rounded = quantise_rows_fp8(x)
    with full_precision(x.device):
        y = linear(rounded.codes.float(), codes.float())
    return (y * rounded.scale.unsqueeze(-1) * scale).to(x.dtype)
