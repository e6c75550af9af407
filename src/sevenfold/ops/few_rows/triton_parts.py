"""Half a layer whose channels lie on several ranks: what they sum, and what becomes of the sum.

    r_i = (sum of o_i^2 / K + eps)^(-1/2)                   of rank i's K channels
    p_i = W_i (r_i o_i w_i sigmoid(g_i)) / r_i              what it adds, beside sum of o_i^2
    y = alpha * stream + beta * R * sum of p_i              R = (sum of o^2 / K_all + eps)^(-1/2)

A factor of a whole row may come after the product: so one sum over ranks does for the norm over all
channels and for the product behind it. Sums are fp32, the M rows' squares behind their products.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.few_rows.types import Residual
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last

_COLUMNS, _WARPS = 1024, 4


@triton.jit(do_not_specialize=["M"])
def _part_kernel(
    o, product, part, M, N, K, eps,
    BK: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a row's product, without its own norm; the first program adds its squares."""
    wait_for_last(OVERLAPS)
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    k = tl.arange(0, BK)
    own = tl.load(o + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    squares = tl.sum(own * own, axis=0)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    got = tl.load(product + row * N + n, mask=n < N, other=0.0)
    tl.store(part + row * N + n, got * tl.sqrt_rn(squares / K + eps), mask=n < N)
    if block == 0:
        tl.store(part + M.to(tl.int64) * N + row, squares)


@triton.jit
def _join_parts_kernel(
    sums, squares, stream, y, N, channels, eps, alpha, beta,
    COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of a row: its sum, normalised where squares are given, and the stream."""
    wait_for_last(OVERLAPS)
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(sums + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    if squares is not None:
        total *= tl.div_rn(1.0, tl.sqrt_rn(tl.load(squares + row) / channels + eps))
    joined = tl.load(stream + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    total = alpha * joined + beta * total
    tl.store(y + row * N + n, total.to(y.dtype.element_ty), mask=n < N)


def part(o: Tensor, product: Tensor, eps: float) -> Tensor:
    """What this rank adds, [M N + M] fp32: product [M, N] of o [M, K], and o's squares."""
    (M, K), N = o.shape, product.shape[1]
    found = torch.empty(M * N + M, dtype=torch.float32, device=o.device)
    _part_kernel[(cdiv(N, _COLUMNS), M)](
        o, product, found, M, N, K, eps,
        BK=next_power_of_2(K), COLUMNS=_COLUMNS, num_warps=_WARPS, **overlapping(o),
    )  # fmt: skip
    return found


def join_part(
    sums: Tensor, stream: Tensor, residual: Residual, num_channels: int, eps: float
) -> Tensor:
    """alpha * stream + beta * R sums, of what `part` has returned, summed over the ranks: [M, N].

    num_channels: of all ranks.
    """
    products, squares = sums.split([stream.numel(), len(stream)])
    return _joined(products, squares, stream, residual, (num_channels, eps))


def join_sum(sums: Tensor, stream: Tensor, residual: Residual) -> Tensor:
    """alpha * stream + beta * sums, [M, N] each."""
    return _joined(sums, None, stream, residual, (1, 0.0))


def _joined(
    sums: Tensor,
    squares: Tensor | None,
    stream: Tensor,
    residual: Residual,
    norm: tuple[int, float],
) -> Tensor:
    (M, N), y = stream.shape, torch.empty_like(stream)
    _join_parts_kernel[(cdiv(N, _COLUMNS), M)](
        sums, squares, stream, y, N, *norm, float(residual.alpha), float(residual.beta),
        COLUMNS=_COLUMNS, num_warps=_WARPS, **overlapping(stream),
    )  # fmt: skip
    return y
