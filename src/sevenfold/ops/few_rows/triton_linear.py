"""Products of a few rows with up to three weights, or before a residual.

    project    y_i = W_i x, SiLU on y_0 where lightning attention is fed
    join       y = alpha * stream + beta * W x

All weights of `project` stream in one launch. Its SiLU parts q, k and v as it writes them.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.few_rows.tiles import Tile, linear_tile
from sevenfold.ops.few_rows.triton_product import multiply
from sevenfold.ops.few_rows.types import Residual
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv
from sevenfold.ops.triton_overlap import wait_for_last


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    x, w0, w1, w2, y0, y1, y2, M, N0, N1, N2,
    D: tl.constexpr, LIGHTNING: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    tile, m = tl.program_id(0), tl.arange(0, BM)
    tiles0, tiles1 = tl.cdiv(N0, BN), tl.cdiv(N1, BN)
    part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    w, y, N = w0, y0, N0
    if part == 1:
        w, y, N = w1, y1, N1
    if part == 2:
        w, y, N = w2, y2, N2
    first = (tile - tl.where(part > 0, tiles0, 0) - tl.where(part > 1, tiles1, 0)) * BN
    w = tl.multiple_of(w, 16) + first.to(tl.int64) * K
    wait_for_last(OVERLAPS)
    # Columns of nobody read the last one.
    left, n = tl.minimum(tl.arange(0, BN), N - 1 - first), first + tl.arange(0, BN)
    got = multiply(w, left, x, m * K, m < M, K, BN, BM, BK, WK, STAGES)
    at = m[None, :] * N + n[:, None]
    if LIGHTNING:
        if part == 0:  # [H, (q, k, v), D] to [(q, k, v), M, H, D]
            got *= tl.sigmoid(got)
            head = n // (3 * D)
            inner = (n % (3 * D)) // D * (M * (N // 3)) + head * D + n % D
            at = m[None, :] * (N // 3) + inner[:, None]
    tl.store(y + at, got.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def _project(
    x: Tensor, weights: Sequence[Tensor], ys: Sequence[Tensor], head_dim: int, tile: Tile
) -> None:
    """head_dim: of lightning attention, else 0."""
    w, y = [*weights, *[weights[0]] * (3 - len(weights))], [*ys, *[ys[0]] * (3 - len(ys))]
    sizes = [*map(len, weights), 0, 0][:3]
    _project_kernel[(sum(cdiv(size, tile.BN) for size in sizes),)](
        x, *w, *y, len(x), *sizes, D=max(1, head_dim), LIGHTNING=head_dim > 0,
        K=x.shape[1], **constants(tile), **overlapping(x),
    )  # fmt: skip


def constants(tile: Tile) -> dict[str, int]:
    """A kernel's constants of its tile."""
    named = tile._asdict()
    stages = named.pop("num_stages")
    return {**named, "STAGES": stages}


def project(x: Tensor, weights: Sequence[Tensor], tile: Tile) -> list[Tensor]:
    """W_i x of one to three weights [N_i, K]: [M, N_i] each."""
    ys = [x.new_empty(len(x), len(w)) for w in weights]
    _project(x, weights, ys, 0, tile)
    return ys


def product(x: Tensor, weight: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """W x [M, N] in another dtype than x's."""
    y = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    _project(x, [weight], [y], 0, tile or linear_tile(len(x), weight, len(weight)))
    return y


def project_lightning(
    x: Tensor, weights: tuple[Tensor, Tensor], num_heads: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """silu(W_qkv x) and W_gate x: qkv [3, M, H, D], gate [M, H D]."""
    M, (qkv, gate) = len(x), weights
    D = len(qkv) // 3 // num_heads
    ys = (x.new_empty(3, M, num_heads, D), x.new_empty(M, len(gate)))
    _project(x, weights, ys, D, tile)
    return ys


@triton.jit(do_not_specialize=["M"])
def _join_kernel(
    x, w, stream, y, M, N, alpha, beta,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    first, m = tl.program_id(0) * BN, tl.arange(0, BM)
    w += first.to(tl.int64) * K
    wait_for_last(OVERLAPS)
    left, n = tl.minimum(tl.arange(0, BN), N - 1 - first), first + tl.arange(0, BN)
    got = multiply(w, left, x, m * K, m < M, K, BN, BM, BK, WK, STAGES)
    at, inside = m[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]
    joined = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    got = alpha * joined + beta * got
    tl.store(y + at, got.to(y.dtype.element_ty), mask=inside)


def join(x: Tensor, weight: Tensor, stream: Tensor, residual: Residual, tile: Tile) -> Tensor:
    """alpha * stream + beta * W x: [M, N]; x is [M, K]."""
    y, N = torch.empty_like(stream), len(weight)
    _join_kernel[(cdiv(N, tile.BN),)](
        x, weight, stream, y, len(x), N, float(residual.alpha), float(residual.beta),
        K=x.shape[1], **constants(tile), **overlapping(x),
    )  # fmt: skip
    return y
