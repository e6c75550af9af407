"""Products of a few rows with up to three weights, or before a residual.

    project    y_i = W_i RMSNorm(x), SiLU on y_0 where lightning attention is fed
    join       y = alpha * stream + beta * W x, or W (RMSNorm(x) * sigmoid(gate))

All weights of `project` stream in one launch. Its SiLU parts q, k and v as it writes them. A norm
is part of the launch where a program holds one whole row, else a kernel before it.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.few_rows.tiles import Tile, linear_tile
from sevenfold.ops.few_rows.triton_product import (
    held_row,
    held_rows,
    multiply,
    norm_factor,
    times_row,
)
from sevenfold.ops.few_rows.types import Norm, Residual
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.rms_norm.triton_rms_norm import normed
from sevenfold.ops.row_launch import cdiv
from sevenfold.ops.triton_overlap import wait_for_last


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    x, norm, u, w0, w1, w2, y0, y1, y2, M, N0, N1, N2, eps,
    D: tl.constexpr, LIGHTNING: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    tile, m = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM)
    tiles0, tiles1 = tl.cdiv(N0, BN), tl.cdiv(N1, BN)
    part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
    w, y, N = w0, y0, N0
    if part == 1:
        w, y, N = w1, y1, N1
    if part == 2:
        w, y, N = w2, y2, N2
    first = (tile - tl.where(part > 0, tiles0, 0) - tl.where(part > 1, tiles1, 0)) * BN
    w = tl.multiple_of(w, 16) + first.to(tl.int64) * K
    # Columns of nobody read the last one.
    left, n = tl.minimum(tl.arange(0, BN), N - 1 - first), first + tl.arange(0, BN)
    if norm is None:
        wait_for_last(OVERLAPS)
        got = multiply(w, left, x, m * K, m < M, K, BN, BM, BK, WK, STAGES)
    else:
        rows, scale = held_rows(w, left, K, BK), held_row(norm, K, BK)
        wait_for_last(OVERLAPS)
        row = held_row(x, K, BK)
        row = (row * norm_factor(row, eps, K) * scale).to(u.dtype.element_ty)
        got = times_row(rows, row)
        if tile == 0:
            k = tl.arange(0, BK)[None, :]
            tl.store(u + k, row, mask=k < K)
    at = m[None, :] * N + n[:, None]
    if LIGHTNING:
        if part == 0:  # [H, (q, k, v), D] to [(q, k, v), M, H, D]
            got *= tl.sigmoid(got)
            head = n // (3 * D)
            inner = (n % (3 * D)) // D * (M * (N // 3)) + head * D + n % D
            at = m[None, :] * (N // 3) + inner[:, None]
    tl.store(y + at, got.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


class GatedNorm(NamedTuple):
    """RMSNorm(x) * sigmoid(gate), gate [M, K]."""

    norm: Norm
    gate: Tensor


def _holds_row(tile: Tile, x: Tensor) -> bool:
    """Whether a program that multiplies x [M, K] has all of its one row."""
    return tile.BM == 1 and x.shape[1] <= tile.BK


def _project(
    x: Tensor,
    norm: Norm | None,
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    head_dim: int,
    tile: Tile,
) -> Tensor:
    """The products into ys, of x's norm if there is one; returns what was multiplied.

    head_dim: of lightning attention, else 0.
    """
    if norm is not None and not _holds_row(tile, x):
        x, norm = normed(x, None, *norm), None
    u = x if norm is None else torch.empty_like(x)
    by, eps = norm or (None, 0.0)
    w, y = [*weights, *[weights[0]] * (3 - len(weights))], [*ys, *[ys[0]] * (3 - len(ys))]
    sizes = [*map(len, weights), 0, 0][:3]
    _project_kernel[(sum(cdiv(size, tile.BN) for size in sizes), cdiv(len(x), tile.BM))](
        x, by, u, *w, *y, len(x), *sizes, eps, D=max(1, head_dim), LIGHTNING=head_dim > 0,
        K=x.shape[1], **constants(tile), **overlapping(x),
    )  # fmt: skip
    return u


def constants(tile: Tile) -> dict[str, int]:
    """A kernel's constants of its tile."""
    named = tile._asdict()
    stages = named.pop("num_stages")
    return {**named, "STAGES": stages}


def project(
    x: Tensor, norm: Norm, weights: Sequence[Tensor], tile: Tile
) -> tuple[list[Tensor], Tensor]:
    """W_i u of one to three weights [N_i, K], u = RMSNorm(x): [M, N_i] each, and u."""
    ys = [x.new_empty(len(x), len(w)) for w in weights]
    return ys, _project(x, norm, weights, ys, 0, tile)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """W x [M, N] in another dtype than x's."""
    y = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    _project(x, None, [weight], [y], 0, tile or linear_tile(len(x), weight, len(weight)))
    return y


def project_lightning(
    x: Tensor, norm: Norm, weights: tuple[Tensor, Tensor], num_heads: int, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(W_qkv u) and W_gate u, u = RMSNorm(x): qkv [3, M, H, D], gate [M, H D], and u."""
    M, (qkv, gate) = len(x), weights
    D = len(qkv) // 3 // num_heads
    ys = (x.new_empty(3, M, num_heads, D), x.new_empty(M, len(gate)))
    return *ys, _project(x, norm, weights, ys, D, tile)


@triton.jit(do_not_specialize=["M"])
def _join_kernel(
    x, norm, gate, w, stream, y, M, N, eps, alpha, beta,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    first, m = tl.program_id(0) * BN, tl.program_id(1) * BM + tl.arange(0, BM)
    w += first.to(tl.int64) * K
    left, n = tl.minimum(tl.arange(0, BN), N - 1 - first), first + tl.arange(0, BN)
    at, inside = m[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]
    if norm is None:
        wait_for_last(OVERLAPS)
        if stream is not None:
            joined = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
        got = multiply(w, left, x, m * K, m < M, K, BN, BM, BK, WK, STAGES)
    else:
        rows, scale = held_rows(w, left, K, BK), held_row(norm, K, BK)
        wait_for_last(OVERLAPS)
        if stream is not None:
            joined = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
        row, opened = held_row(x, K, BK), tl.sigmoid(held_row(gate, K, BK))
        row = (row * norm_factor(row, eps, K) * (scale * opened)).to(x.dtype.element_ty)
        got = times_row(rows, row)
    if stream is not None:
        got = alpha * joined + beta * got
    tl.store(y + at, got.to(y.dtype.element_ty), mask=inside)


def join(
    x: Tensor,
    weight: Tensor,
    stream: Tensor,
    residual: Residual,
    tile: Tile,
    by: GatedNorm | None = None,
) -> Tensor:
    """alpha * stream + beta * W x: [M, N]; x is [M, K], first normalised and gated `by` this."""
    y = torch.empty_like(stream)
    _join(x, weight, y, (stream, residual.alpha, residual.beta), tile, by)
    return y


def gated_product(x: Tensor, weight: Tensor, by: GatedNorm, tile: Tile) -> Tensor:
    """W (RMSNorm(x) * sigmoid(gate)) [M, N] fp32, x [M, K] normalised and gated `by` this."""
    y = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    _join(x, weight, y, (None, 0.0, 1.0), tile, by)
    return y


def _join(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    joined: tuple[Tensor | None, float, float],
    tile: Tile,
    by: GatedNorm | None,
) -> None:
    """The product into y, joined with a stream by alpha and beta if there is one."""
    if by is not None and not _holds_row(tile, x):
        x, by = normed(x, by.gate, *by.norm), None
    (norm, eps), gate = by or ((None, 0.0), None)
    (stream, alpha, beta), N = joined, len(weight)
    _join_kernel[(cdiv(N, tile.BN), cdiv(len(x), tile.BM))](
        x, norm, gate, weight, stream, y, len(x), N, eps, float(alpha), float(beta),
        K=x.shape[1], **constants(tile), **overlapping(x),
    )  # fmt: skip
