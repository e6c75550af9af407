"""SwiGLU of one or two tokens, each by its own experts: their weights are read once a token.

    hidden_c = p_c * silu(W_gate,e u_t) * W_up,e u_t      c = (t, j), e = expert j of token t
    y_t = alpha * stream_t + beta * sum over j of W_down,e hidden_c

What bounds these is how long a load takes, not how many there are: a program asks for all weights
that it will multiply, and the barrier behind these loads keeps the compiler from putting some off.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.few_rows.tiles import Tile
from sevenfold.ops.few_rows.triton_router import Choice
from sevenfold.ops.few_rows.types import Residual
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv
from sevenfold.ops.triton_overlap import wait_for_last


@triton.jit
def _part(x, k, K, even: tl.constexpr):
    """Columns k of one or more rows x."""
    if even:
        return tl.load(x + k)
    return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def _gate_up_kernel(
    x, w, experts, shares, hidden, F,
    CHOSEN: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BN hidden channels of one choice."""
    wait_for_last(OVERLAPS)
    even: tl.constexpr = K % BK == 0
    c = tl.program_id(1)
    f = tl.program_id(0) * BN + tl.arange(0, BN)
    share, expert = tl.load(shares + c), tl.load(experts + c).to(tl.int64)
    # Channels of nobody read the last one.
    gates = w + expert * 2 * F * K + tl.minimum(f, F - 1)[:, None] * K
    gate, up = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)[None, :]
        left, right = _part(gates, k, K, even), _part(gates + F * K, k, K, even)
        tl.debug_barrier()
        row = _part(x + c // CHOSEN * K, k, K, even).to(tl.float32)
        gate += left.to(tl.float32) * row
        up += right.to(tl.float32) * row
    opened, fed = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    out = share * (opened * tl.sigmoid(opened) * fed)
    tl.store(hidden + c * F + f, out.to(hidden.dtype.element_ty), mask=f < F)


@triton.jit
def _down_kernel(
    x, w, experts, stream, y, N, alpha, beta,
    CHOSEN: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BN channels of one token's result, from two of its choices at a time."""
    wait_for_last(OVERLAPS)
    even: tl.constexpr = K % BK == 0
    token = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    joined = tl.load(stream + token * N + n, mask=n < N, other=0.0).to(tl.float32)
    w += tl.minimum(n, N - 1)[:, None] * K
    products = tl.zeros([BN, BK], tl.float32)
    for j in tl.static_range(0, CHOSEN, 2):
        c = token * CHOSEN + j
        other = c + 1 if j + 1 < CHOSEN else c
        one, two = tl.load(experts + c).to(tl.int64), tl.load(experts + other).to(tl.int64)
        for start in tl.range(0, K, BK):
            k = start + tl.arange(0, BK)[None, :]
            left, right = _part(w + one * N * K, k, K, even), _part(w + two * N * K, k, K, even)
            tl.debug_barrier()
            row = _part(x + c * K, k, K, even).to(tl.float32)
            products += left.to(tl.float32) * row
            if j + 1 < CHOSEN:
                row = _part(x + other * K, k, K, even).to(tl.float32)
                products += right.to(tl.float32) * row
    total = alpha * joined + beta * tl.sum(products, axis=1)
    tl.store(y + token * N + n, total.to(y.dtype.element_ty), mask=n < N)


def gate_up(choice: Choice, weight: Tensor, tile: Tile) -> Tensor:
    """The hidden rows [M k, F] of all choices, weighed; weight [E, 2 F, K]."""
    (_, F2, K), (M, chosen) = weight.shape, choice.experts.shape
    hidden = choice.u.new_empty(M * chosen, F2 // 2)
    channels = max(1, tile.BN // 2)
    _gate_up_kernel[(cdiv(F2 // 2, channels), M * chosen)](
        choice.u, weight, choice.experts, choice.weights, hidden, F2 // 2,
        CHOSEN=chosen, K=K, BN=channels, BK=tile.BK, num_warps=tile.num_warps,
        **overlapping(hidden),
    )  # fmt: skip
    return hidden


def down(
    hidden: Tensor, choice: Choice, weight: Tensor, stream: Tensor, residual: Residual, tile: Tile
) -> Tensor:
    """The experts' second product, sum and residual [M, N]; weight [E, N, F]."""
    (_, N, K), (M, chosen) = weight.shape, choice.experts.shape
    y = torch.empty_like(stream)
    _down_kernel[(cdiv(N, tile.BN), M)](
        hidden, weight, choice.experts, stream, y, N, float(residual.alpha),
        float(residual.beta), CHOSEN=chosen, K=K, BN=tile.BN, BK=tile.BK,
        num_warps=tile.num_warps, **overlapping(hidden),
    )  # fmt: skip
    return y
