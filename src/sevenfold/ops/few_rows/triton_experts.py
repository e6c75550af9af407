"""SwiGLU of a few rows, dense or by experts: no sort, no counts on the host.

    hidden_c = p_c * silu(W_gate,e u_t) * W_up,e u_t      c = (t, j), e = expert j of token t
    y_t = alpha * stream_t + beta * sum over j of W_down,e hidden_c

A program owns some output channels of one expert and finds its expert's rows among the M * k
choices by itself. A tile holds twice an expert's even share of rows; an expert with more takes
another round, over a weight that the cache has just seen. Choices weigh the hidden rows, so that a
token's sum is plain: by a last kernel, in the order of the choices. One or two tokens go another
way, by triton_alone.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.few_rows import triton_alone
from sevenfold.ops.few_rows.tiles import Tile, alone_tiles, down_tile, gate_up_tile
from sevenfold.ops.few_rows.triton_linear import constants
from sevenfold.ops.few_rows.triton_product import multiply
from sevenfold.ops.few_rows.triton_router import Choice
from sevenfold.ops.few_rows.types import Residual
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last

_ALONE = 2  # tokens up to which each reads its own experts
_COLUMNS, _WARPS = 1024, 4


@triton.jit
def _expert_of(experts, R, E, P: tl.constexpr, BY_CHOICE: tl.constexpr):
    """A program's expert, or -1; how many of the R choices are its, and up to each of them.

    BY_CHOICE: there are fewer choices than experts, and the first that names an expert serves it.
    """
    c = tl.arange(0, P)
    chosen = tl.load(experts + c, mask=c < R, other=-1)
    expert = tl.program_id(1)
    if BY_CHOICE:
        own = tl.program_id(1)
        expert = tl.load(experts + own)
        before = tl.sum(((chosen == expert) & (c < own)).to(tl.int32), axis=0)
        expert = tl.where(before > 0, -1, expert)
    mine = ((chosen == expert) & (c < R)).to(tl.int32)
    return expert, tl.sum(mine, axis=0), tl.cumsum(mine, 0)


@triton.jit
def _choices(count, up_to, first, BM: tl.constexpr):
    """The choices at the places `first` to first + BM - 1 of an expert, and which are there."""
    m = first + tl.arange(0, BM)
    # Before the choice at place m stand all up to which there are at most m: one comparison each.
    return tl.sum((up_to[None, :] <= m[:, None]).to(tl.int32), axis=1), m < count


@triton.jit
def _gate_up_rows(
    x, w, shares, hidden, c, used, chosen, F,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BN / 2 channels of gate and the same of up, of BM choices: both weights stream at once."""
    half: tl.constexpr = BN // 2
    first, i = tl.program_id(0) * half, tl.arange(0, BN)
    n = tl.minimum(i % half, F - 1 - first) + tl.where(i < half, 0, F)
    w += first.to(tl.int64) * K
    got = multiply(w, n, x, c // chosen * K, used, K, BN, BM, BK, WK, STAGES)
    gate, up = tl.split(tl.permute(tl.reshape(got, [2, half, BM]), (1, 2, 0)))
    out = gate * tl.sigmoid(gate) * up
    if shares is not None:
        out *= tl.load(shares + c, mask=used, other=0.0)[None, :]
    f = first + tl.arange(0, half)
    at = hidden + c[None, :] * F + f[:, None]
    tl.store(at, out.to(hidden.dtype.element_ty), mask=used[None, :] & (f < F)[:, None])


@triton.jit(do_not_specialize=["M"])
def _dense_kernel(
    x, w, hidden, M, F,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    _gate_up_rows(x, w, None, hidden, m, m < M, 1, F, K, BN, BM, BK, WK, STAGES)


@triton.jit(do_not_specialize=["R"])
def _gate_up_kernel(
    x, w, experts, shares, hidden, R, E, F,
    CHOSEN: tl.constexpr, P: tl.constexpr, BY_CHOICE: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    expert, count, up_to = _expert_of(experts, R, E, P, BY_CHOICE)
    if expert < 0:
        return
    w += expert.to(tl.int64) * 2 * F * K
    for first in range(0, count, BM):
        c, used = _choices(count, up_to, first, BM)
        _gate_up_rows(
            x, w, shares, hidden, c, used, CHOSEN, F, K, BN, BM, BK, WK, STAGES
        )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def _down_kernel(
    x, w, experts, rows, R, E, N,
    P: tl.constexpr, BY_CHOICE: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    expert, count, up_to = _expert_of(experts, R, E, P, BY_CHOICE)
    if expert < 0:
        return
    first_n = tl.program_id(0) * BN
    n = first_n + tl.arange(0, BN)
    left = tl.minimum(tl.arange(0, BN), N - 1 - first_n)
    w += (expert.to(tl.int64) * N + first_n) * K
    for first in range(0, count, BM):
        c, used = _choices(count, up_to, first, BM)
        got = multiply(w, left, x, c * K, used, K, BN, BM, BK, WK, STAGES)
        tl.store(rows + c[None, :] * N + n[:, None], got, mask=used[None, :] & (n < N)[:, None])


@triton.jit
def _total_kernel(
    rows, stream, y, N, alpha, beta,
    CHOSEN: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A token's rows, summed in the order of its choices, and its residual."""
    wait_for_last(OVERLAPS)
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for j in tl.static_range(CHOSEN):
        total += tl.load(rows + (token * CHOSEN + j) * N + n, mask=n < N, other=0.0)
    joined = tl.load(stream + token * N + n, mask=n < N, other=0.0).to(tl.float32)
    total = alpha * joined + beta * total
    tl.store(y + token * N + n, total.to(y.dtype.element_ty), mask=n < N)


def gate_up(choice: Choice, weight: Tensor, tile: Tile) -> Tensor:
    """The hidden rows [M k, F] of all choices, weighed; weight [E, 2 F, K]."""
    (E, F2, K), (M, chosen) = weight.shape, choice.experts.shape
    hidden = choice.u.new_empty(M * chosen, F2 // 2)
    _gate_up_kernel[(cdiv(F2 // 2, tile.BN // 2), min(E, M * chosen))](
        choice.u, weight, choice.experts, choice.weights, hidden, M * chosen, E, F2 // 2,
        CHOSEN=chosen, P=_padded(M * chosen), BY_CHOICE=M * chosen < E, K=K, **constants(tile),
        **overlapping(hidden),
    )  # fmt: skip
    return hidden


def down(hidden: Tensor, choice: Choice, weight: Tensor, tile: Tile) -> Tensor:
    """W_down of hidden rows [M k, F]: [M k, N] fp32; weight [E, N, F]."""
    (E, N, K), R = weight.shape, len(hidden)
    rows = torch.empty(R, N, dtype=torch.float32, device=hidden.device)
    _down_kernel[(cdiv(N, tile.BN), min(E, R))](
        hidden, weight, choice.experts, rows, R, E, N,
        P=_padded(R), BY_CHOICE=R < E, K=K, **constants(tile), **overlapping(hidden),
    )  # fmt: skip
    return rows


def total(rows: Tensor, stream: Tensor, residual: Residual) -> Tensor:
    """Sum each token's rows [M k, N], and join the stream [M, N]."""
    (M, N), y = stream.shape, torch.empty_like(stream)
    _total_kernel[(cdiv(N, _COLUMNS), M)](
        rows, stream, y, N, float(residual.alpha), float(residual.beta),
        CHOSEN=len(rows) // M, COLUMNS=_COLUMNS, num_warps=_WARPS, **overlapping(rows),
    )  # fmt: skip
    return y


def feed(
    choice: Choice, gate_up_proj: Tensor, down_proj: Tensor, stream: Tensor, residual: Residual
) -> Tensor:
    """Experts and residual after the router's choice: [M, D]."""
    M, R = len(stream), choice.experts.numel()
    if M <= _ALONE:
        first, second = alone_tiles(gate_up_proj, down_proj)
        hidden = triton_alone.gate_up(choice, gate_up_proj, first)
        return triton_alone.down(hidden, choice, down_proj, stream, residual, second)
    hidden = gate_up(choice, gate_up_proj, gate_up_tile(R, gate_up_proj))
    rows = down(hidden, choice, down_proj, down_tile(R, down_proj))
    return total(rows, stream, residual)


def dense_gate_up(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """SwiGLU's hidden rows [M, F] of x [M, K]; weight [2 F, K]."""
    (M, K), F = x.shape, len(weight) // 2
    hidden = x.new_empty(M, F)
    _dense_kernel[(cdiv(F, tile.BN // 2), cdiv(M, tile.BM))](
        x, weight, hidden, M, F, K=K, **constants(tile), **overlapping(x),
    )  # fmt: skip
    return hidden


def _padded(choices: int) -> int:
    return max(16, next_power_of_2(choices))
