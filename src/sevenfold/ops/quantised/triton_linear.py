"""The linear layer with an 8-bit weight: the Triton form."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.operator import operator
from sevenfold.ops.quantised.rule import Tile, linear_tile, product_path
from sevenfold.ops.quantised.triton_product import multiply
from sevenfold.ops.quantised.triton_widen import rounded_to_fp8, widened
from sevenfold.ops.row_launch import cdiv


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, x_scale, codes, scale, y, M, N,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    in_n, in_m, m = n < N, m < M, m.to(tl.int64)
    # Columns of nobody read the last one.
    got = multiply(codes, tl.minimum(n, N - 1), x, m * K, in_m, K, BN, BM, BK, WK, STAGES)
    got *= tl.load(scale + n, mask=in_n, other=0.0)[:, None]
    if x_scale is not None:
        got *= tl.load(x_scale + m, mask=in_m, other=0.0)[None, :]
    at = y + m[None, :] * N + n[:, None]
    tl.store(at, got.to(y.dtype.element_ty), mask=in_m[None, :] & in_n[:, None])


@operator("sevenfold::int8_linear")
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The product [M, N] of rows x [M, K]; the rest as in the public operator."""
    if product_path(len(x)) == "scratch":
        return F.linear(x, widened(codes, scale, x.dtype))
    return _product(x, None, codes, scale)


@operator("sevenfold::fp8_linear")
def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The product [M, N] of rows x [M, K]; the rest as in the public operator."""
    rounded, x_scale = rounded_to_fp8(x, x.dtype)
    return _product(rounded, x_scale, codes, scale)


@int8_linear.register_fake
@fp8_linear.register_fake
def _fake(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _product(x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    tile = linear_tile(len(x), len(codes), x.device)
    return run(x.contiguous(), x_scale, codes, scale, tile)


def run(x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, tile: Tile) -> Tensor:
    """The product by the kernel in a tile that is given, which tuning tries."""
    (M, K), N = x.shape, len(codes)
    y = x.new_empty(M, N)
    if y.numel():
        _linear_kernel[(cdiv(N, tile.BN), cdiv(M, tile.BM))](
            x, x_scale, codes, scale, y, M, N,
            K=K, BN=tile.BN, BM=tile.BM, BK=tile.BK, WK=tile.WK,
            STAGES=tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
    return y
