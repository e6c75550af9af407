"""Passes beside the products: a weight widened into memory, and rows rounded to fp8."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.low_precision.fp8 import LARGEST_FP8
from sevenfold.ops.row_launch import cdiv

_ROWS, _COLUMNS, _WARPS = 2, 1024, 4
_BLOCK = 1024  # columns of a row that are rounded at once

_LARGEST = tl.constexpr(LARGEST_FP8)
_LEAST_NORMAL = tl.constexpr(2.0**-6)
# Adding and taking it away rounds to whole multiples of 2^-9, the spacing below _LEAST_NORMAL.
_TO_2_9 = tl.constexpr(1.5 * 2.0**14)


@triton.jit
def _widen_kernel(codes, scale, out, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (n < N) & (k < K)
    wide = tl.load(codes + n * K + k, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.load(scale + n, mask=n < N, other=0.0)
    tl.store(out + n * K + k, wide.to(out.dtype.element_ty), mask=inside)


def widened(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [..., N, K] times scale [..., N], rounded to the dtype: one pass."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    N, K = scale.numel(), codes.shape[-1]
    if out.numel():
        _widen_kernel[(cdiv(N, _ROWS), cdiv(K, _COLUMNS))](
            codes, scale, out, N, K, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS
        )
    return out


@triton.jit
def round_to_fp8(x):
    """The nearest fp8 number, ties to even, of finite |x| <= 464; kept in fp32."""
    bits = x.to(tl.int32, bitcast=True)
    # 20 of fp32's 23 stored bits have no place; adding to the bits carries into the exponent.
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    tiny = (x + _TO_2_9) - _TO_2_9
    return tl.where(tl.abs(x) < _LEAST_NORMAL, tiny, normal.to(tl.float32, bitcast=True))


@triton.jit
def _round_kernel(x, out, scale, K: tl.constexpr, BLOCK: tl.constexpr):
    row, ik = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x += row * K
    # The bits of a magnitude are in the order of magnitudes, and a NaN's above an infinity's.
    peaks = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        part = tl.load(x + start + ik, mask=start + ik < K, other=0.0).to(tl.float32)
        peaks = tl.maximum(peaks, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    peak = tl.max(peaks).to(tl.float32, bitcast=True)
    step = tl.div_rn(peak, _LARGEST)
    tl.store(scale + row, step)
    step = tl.where(step == 0, 1.0, step)
    for start in range(0, K, BLOCK):
        part = tl.load(x + start + ik, mask=start + ik < K, other=0.0).to(tl.float32)
        scaled = round_to_fp8(tl.div_rn(part, step))
        # A row that is not finite has a scale that is not: 0 makes NaN of it.
        scaled = tl.where(peak < float("inf"), scaled, 0.0)
        tl.store(out + row * K + start + ik, scaled.to(out.dtype.element_ty), mask=start + ik < K)


def rounded_to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of quantise_rows_fp8 [R, K] in a dtype that holds them, and the scales."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if out.numel():
        _round_kernel[(len(x),)](x, out, scale, K=x.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)
    return out, scale
