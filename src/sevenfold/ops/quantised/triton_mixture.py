"""A mixture of SwiGLU experts with 8-bit weights, in three kernels that wait for nothing.

The first takes each row from its token, multiplies by gate and up at once and applies SwiGLU; the
second multiplies by the down projection; the third sums a token's rows by weight. A program owns
some output channels of one expert and some of its rows, and finds which by the counts on the
device: the grid is the most that R rows of E experts can need.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.experts import triton_mixture, triton_rows
from sevenfold.ops.operator import operator
from sevenfold.ops.quantised.rule import Tile, expert_tiles, product_path
from sevenfold.ops.quantised.triton_product import multiply
from sevenfold.ops.quantised.triton_widen import rounded_to_fp8, widened
from sevenfold.ops.row_launch import cdiv, next_power_of_2

_MULTIPLE = 8  # of D and F, for torch.nn.functional.grouped_mm


class Plan(NamedTuple):
    """A Dispatch: choice [R], row [T, k], rows_per_expert [E]."""

    choice: Tensor
    row: Tensor
    rows_per_expert: Tensor


@triton.jit
def _place(counts, E, tile, BM: tl.constexpr, EP: tl.constexpr):
    """Which expert a tile belongs to (E for nobody), its rows, and which of them are used."""
    e = tl.arange(0, EP)
    count = tl.load(counts + e, mask=e < E, other=0)
    tiles = (count + BM - 1) // BM
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32))
    before = tl.sum(tl.where(e < expert, tiles, 0))
    first = tl.sum(tl.where(e < expert, count, 0))
    within = (tile - before) * BM + tl.arange(0, BM)
    used = within < tl.sum(tl.where(e == expert, count, 0))
    return tl.minimum(expert, E), (first + within).to(tl.int64), used


@triton.jit
def _gate_up_kernel(
    x, x_scale, codes, scale, counts, choice, out, E, F, chosen,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    EP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BN / 2 channels of gate and the same of up: rows of one tile, so that both stream at once."""
    expert, row, used = _place(counts, E, tl.program_id(0), BM, EP)
    if expert == E:
        return
    half: tl.constexpr = BN // 2
    i = tl.arange(0, BN)
    f = tl.program_id(1) * half + i % half
    n = tl.minimum(f, F - 1) + tl.where(i < half, 0, F)
    codes += expert.to(tl.int64) * 2 * F * K
    token = tl.load(choice + row, mask=used, other=0) // chosen
    got = multiply(codes, n, x, token * K, used, K, BN, BM, BK, WK, STAGES)
    got *= tl.load(scale + expert * 2 * F + n)[:, None]
    if x_scale is not None:
        got *= tl.load(x_scale + token, mask=used, other=0.0)[None, :]
    pairs = tl.permute(tl.reshape(got, [2, half, BM]), (1, 2, 0))
    gate, up = tl.split(pairs)
    hidden = gate * tl.sigmoid(gate) * up
    f = tl.program_id(1) * half + tl.arange(0, half)
    at = out + row[None, :] * F + f[:, None]
    tl.store(at, hidden.to(out.dtype.element_ty), mask=used[None, :] & (f < F)[:, None])


@triton.jit
def _down_kernel(
    x, x_scale, codes, scale, counts, out, E, N,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    EP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    expert, row, used = _place(counts, E, tl.program_id(0), BM, EP)
    if expert == E:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_n = n < N
    codes += expert.to(tl.int64) * N * K
    got = multiply(codes, tl.minimum(n, N - 1), x, row * K, used, K, BN, BM, BK, WK, STAGES)
    got *= tl.load(scale + expert * N + n, mask=in_n, other=0.0)[:, None]
    if x_scale is not None:
        got *= tl.load(x_scale + row, mask=used, other=0.0)[None, :]
    at = out + row[None, :] * N + n[:, None]
    tl.store(at, got.to(out.dtype.element_ty), mask=used[None, :] & in_n[:, None])


@operator("sevenfold::int8_mixture")
def int8_mixture(
    x: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor,
    down_scale: Tensor, choice: Tensor, row: Tensor, rows_per_expert: Tensor,
) -> Tensor:  # fmt: skip
    """The weighted sum of the experts [T, D]."""
    plan = Plan(choice, row, rows_per_expert)
    if _takes_scratch(x, choice, gate_up):
        wide = (widened(gate_up, gate_up_scale, x.dtype), widened(down, down_scale, x.dtype))
        return triton_mixture.mixture(x, weights, *wide, *plan)[0]
    first, second = expert_tiles(len(choice), len(gate_up), x.device)
    hidden = gate_up_rows(x.contiguous(), None, gate_up, gate_up_scale, plan, first)
    rows = down_rows(hidden, None, down, down_scale, plan, second)
    return triton_rows.total(rows, weights.contiguous(), row)


@operator("sevenfold::fp8_mixture")
def fp8_mixture(
    x: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor,
    down_scale: Tensor, choice: Tensor, row: Tensor, rows_per_expert: Tensor,
) -> Tensor:  # fmt: skip
    """The weighted sum of the experts [T, D]; tokens and hidden rows are rounded to fp8."""
    plan = Plan(choice, row, rows_per_expert)
    first, second = expert_tiles(len(choice), len(gate_up), x.device)
    tokens, token_scale = rounded_to_fp8(x, x.dtype)
    hidden = gate_up_rows(tokens, token_scale, gate_up, gate_up_scale, plan, first)
    hidden, hidden_scale = rounded_to_fp8(hidden, x.dtype)
    rows = down_rows(hidden, hidden_scale, down, down_scale, plan, second)
    return triton_rows.total(rows, weights.contiguous(), row)


@int8_mixture.register_fake
@fp8_mixture.register_fake
def _fake(x, weights, gate_up, gate_up_scale, down, down_scale, choice, row, rows_per_expert):
    return x.new_empty(x.shape)


def _takes_scratch(x: Tensor, choice: Tensor, gate_up: Tensor) -> bool:
    """Whether the weights are widened into memory; the product that reads them takes bf16."""
    E, F2, D = gate_up.shape
    fits = x.dtype is torch.bfloat16 and D % _MULTIPLE == 0 and F2 // 2 % _MULTIPLE == 0
    return fits and product_path(cdiv(len(choice), E)) == "scratch"


def gate_up_rows(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, plan: Plan, tile: Tile
) -> Tensor:
    """SwiGLU of the first product, [R, F]; rows of nobody hold anything."""
    E, F2, K = codes.shape
    hidden, F, half = x.new_empty(len(plan.choice), F2 // 2), F2 // 2, tile.BN // 2
    grid = (_num_tiles(plan, tile), cdiv(F, half))
    if hidden.numel():
        _gate_up_kernel[grid](
            x, x_scale, codes, scale, plan.rows_per_expert, plan.choice, hidden, E, F,
            plan.row.shape[1], **_constants(tile, E, K),
        )  # fmt: skip
    return hidden


def down_rows(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, plan: Plan, tile: Tile
) -> Tensor:
    """The second product of hidden rows x, [R, D]; rows of nobody hold anything."""
    E, N, K = codes.shape
    rows = x.new_empty(len(x), N)
    if rows.numel():
        _down_kernel[(_num_tiles(plan, tile), cdiv(N, tile.BN))](
            x, x_scale, codes, scale, plan.rows_per_expert, rows, E, N, **_constants(tile, E, K)
        )
    return rows


def _num_tiles(plan: Plan, tile: Tile) -> int:
    """Tiles that R rows of E experts can need at most: each expert's last one may be short."""
    R, E = len(plan.choice), len(plan.rows_per_expert)
    return min(R, R // tile.BM + E)


def _constants(tile: Tile, E: int, K: int) -> dict[str, int]:
    return {
        "K": K,
        "BN": tile.BN,
        "BM": tile.BM,
        "BK": tile.BK,
        "WK": tile.WK,
        "EP": max(2, next_power_of_2(E)),
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }
