"""Products of a few rows with up to three weights, past a norm or before a residual.

    project    y_i = W_i RMSNorm(x), SiLU on y_0 and sigmoid on y_1 where lightning attention is fed
    join       y = alpha * stream + beta * W z,    z = x or RMSNorm(x) o gate

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
from sevenfold.ops.few_rows.triton_product import multiply, root
from sevenfold.ops.few_rows.types import Norm, Residual, Stream
from sevenfold.ops.row_launch import cdiv


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    x, norm, roots, w0, w1, w2, y0, y1, y2, M, N0, N1, N2, eps,
    D: tl.constexpr, LIGHTNING: tl.constexpr, SIGMOID: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
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
    # Columns of nobody read the last one.
    left, n = tl.minimum(tl.arange(0, BN), N - 1 - first), first + tl.arange(0, BN)
    got, squares = multiply(w, left, x, m * K, m < M, norm, None, K, BN, BM, BK, WK, STAGES)
    if norm is not None:
        r = root(squares, K, eps)
        got *= r[None, :]
        if roots is not None:
            if tile == 0:
                tl.store(roots + m, r, mask=m < M)
    at = m[None, :] * N + n[:, None]
    if LIGHTNING:
        if part == 0:  # [H, (q, k, v), D] to [(q, k, v), M, H, D]
            got *= tl.sigmoid(got)
            head = n // (3 * D)
            inner = (n % (3 * D)) // D * (M * (N // 3)) + head * D + n % D
            at = m[None, :] * (N // 3) + inner[:, None]
        elif SIGMOID:
            got = tl.sigmoid(got)
    tl.store(y + at, got.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


def _project(
    x: Tensor,
    norm: Norm | None,
    weights: Sequence[Tensor],
    ys: Sequence[Tensor],
    roots: Tensor | None,
    lightning: tuple[int, bool],
    tile: Tile,
) -> None:
    w, y = [*weights, *[weights[0]] * (3 - len(weights))], [*ys, *[ys[0]] * (3 - len(ys))]
    sizes = [*map(len, weights), 0, 0][:3]
    head_dim, sigmoid = lightning
    _project_kernel[(sum(cdiv(size, tile.BN) for size in sizes),)](
        x, None if norm is None else norm.weight, roots, *w, *y, len(x), *sizes,
        0.0 if norm is None else norm.eps,
        D=max(1, head_dim), LIGHTNING=head_dim > 0, SIGMOID=sigmoid,
        K=x.shape[1], **constants(tile),
    )  # fmt: skip


def constants(tile: Tile) -> dict[str, int]:
    """A kernel's constants of its tile."""
    named = tile._asdict()
    stages = named.pop("num_stages")
    return {**named, "STAGES": stages}


def project(
    x: Tensor, norm: Norm | None, weights: Sequence[Tensor], tile: Tile
) -> tuple[list[Tensor], Tensor | None]:
    """W_i RMSNorm(x), or W_i x, of one to three weights [N_i, K]: [M, N_i] each; and the roots."""
    ys, roots = [x.new_empty(len(x), len(w)) for w in weights], new_roots(x, norm)
    _project(x, norm, weights, ys, roots, (0, False), tile)
    return ys, roots


def new_roots(x: Tensor, norm: Norm | None) -> Tensor | None:
    """Room for a norm's roots [M], or None without one."""
    return None if norm is None else torch.empty(len(x), dtype=torch.float32, device=x.device)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W x [M, N] in another dtype than x's."""
    y = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    _project(x, None, [weight], [y], None, (0, False), linear_tile(len(x), weight, len(weight)))
    return y


def project_lightning(
    x: Tensor, norm: Norm | None, weights: tuple[Tensor, Tensor], num_heads: int, tile: Tile
) -> tuple[Tensor, Tensor, Tensor | None]:
    """silu(W_qkv u) and W_gate u: qkv [3, M, H, D], gate [M, H D], and the norm's roots [M].

    With a norm, u = RMSNorm(x) and the gate is past its sigmoid. Without, u is x, there are no
    roots, and the gate is as it comes.
    """
    M, (qkv, gate) = len(x), weights
    D = len(qkv) // 3 // num_heads
    roots = new_roots(x, norm)
    ys = (x.new_empty(3, M, num_heads, D), x.new_empty(M, len(gate)))
    _project(x, norm, weights, ys, roots, (D, norm is not None), tile)
    return *ys, roots


@triton.jit
def load_stream(stream, roots, norm, at, m, n, inside_m, inside_n):
    """What a residual joins, [BN, BM] fp32: as it lies, or past the norm whose roots are known."""
    got = tl.load(stream + at, mask=inside_m & inside_n, other=0.0)
    wide = got.to(tl.float32)
    if roots is not None:
        wide *= tl.load(roots + m, mask=inside_m, other=0.0)
        wide *= tl.load(norm + n, mask=inside_n, other=0.0).to(tl.float32)
        wide = wide.to(got.dtype).to(tl.float32)
    return wide


@triton.jit(do_not_specialize=["M"])
def _join_kernel(
    x, norm, gate, w, stream, stream_roots, stream_norm, y, M, N, eps, alpha, beta,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    first, m = tl.program_id(0) * BN, tl.arange(0, BM)
    w += first.to(tl.int64) * K
    left, n = tl.minimum(tl.arange(0, BN), N - 1 - first), first + tl.arange(0, BN)
    got, squares = multiply(w, left, x, m * K, m < M, norm, gate, K, BN, BM, BK, WK, STAGES)
    if norm is not None:
        got *= root(squares, K, eps)[None, :]
    at, in_m, in_n = m[None, :] * N + n[:, None], (m < M)[None, :], (n < N)[:, None]
    joined = load_stream(stream, stream_roots, stream_norm, at, m[None, :], n[:, None], in_m, in_n)
    got = alpha * joined + beta * got
    tl.store(y + at, got.to(y.dtype.element_ty), mask=in_m & in_n)


def join(
    x: Tensor,
    gated: tuple[Norm, Tensor] | None,
    weight: Tensor,
    stream: Stream,
    residual: Residual,
    tile: Tile,
) -> Tensor:
    """alpha * stream + beta * W z: [M, N]; z is x [M, K], or RMSNorm(x) o gate [M, K]."""
    y, N = torch.empty_like(stream.rows), len(weight)
    norm, gate = (None, None) if gated is None else gated
    _join_kernel[(cdiv(N, tile.BN),)](
        x, None if norm is None else norm.weight, gate, weight, stream.rows, stream.roots,
        stream.weight, y, len(x), N, 0.0 if norm is None else norm.eps,
        float(residual.alpha), float(residual.beta), K=x.shape[1], **constants(tile),
    )  # fmt: skip
    return y
