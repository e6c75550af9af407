"""fp8 products by PyTorch's own operator, with a scale for each row of both sides."""

import torch
from torch import Tensor

from sevenfold.ops.low_precision import FP8, Fp8Rows, quantise_rows_fp8

AVAILABLE = hasattr(torch, "_scaled_mm")
_MULTIPLE = 16  # of K and N, for the operator


def suits(codes: Tensor) -> bool:
    """Whether the operator takes a weight of this shape [N, K]."""
    return AVAILABLE and not any(size % _MULTIPLE for size in codes.shape)


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The product [M, N] of rows x [M, K], bf16; the rest as in the public operator."""
    rounded = _rounded(x)
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rounded.codes,
        codes.t(),
        scale_a=rounded.scale[:, None],
        scale_b=scale[None, :],
        out_dtype=x.dtype,
    )


def _rounded(x: Tensor) -> Fp8Rows:
    """quantise_rows_fp8; on a GPU in one pass."""
    if x.device.type != "cuda":
        return quantise_rows_fp8(x)
    from sevenfold.ops.quantised import triton_widen

    return Fp8Rows(*triton_widen.rounded_to_fp8(x, FP8))
