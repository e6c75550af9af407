"""Products of fp32 matrices on a CPU by register tiles: C = A B^T.

B is packed into panels of COLUMNS rows, and A, where it does not lie well, into stripes of ROWS, so
that a tile reads both in order (Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008). Blocks of C are independent, and each sums over K in one order: the same
bits with any number of threads.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, empty, even_parts, lent, use_torch_threads
from sevenfold.ops.tile import COLUMNS, ROWS, SIDE, add_tile, copy_columns, copy_rows, turn

_BLOCK_ROWS, _BLOCK_INNER = 64, 256  # of A: 64 KB, beside a panel of B of 32 KB
_F = np.float32
# Rows so far apart, or a multiple of it, compete for one place of the cache.
_SAME_PLACE = 1024


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product; arguments and result as in the public operator."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return matmul_nt(_rows(x), weight).view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(_rows(x), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy, dx, dweight = _rows(grads[0]), None, None
        if ctx.needs_input_grad[0]:
            dx = matmul_nt(dy, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = matmul_nt(dy.t(), _rows(x).t())
        return dx, dweight


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """A B^T, [M, N], of a [M, K] and b [N, K], fp32 with any strides, without a gradient."""
    return add_matmul_nt(empty(len(a), len(b)), a, pack(b), keep=False)


def pack(b: Tensor) -> Tensor:
    """Panels [N / COLUMNS, K, COLUMNS] of b [N, K], with zeros after its last row."""
    panels = empty(-(-len(b) // COLUMNS), b.shape[1], COLUMNS)
    use_torch_threads()
    _pack(*_flat(b), panels.numpy(), len(b))
    return panels


def add_matmul_nt(c: Tensor, a: Tensor, panels: Tensor, *, keep: bool) -> Tensor:
    """C = A B^T, or C += A B^T with keep, of what is packed; c [M, N] with neighbours in a row."""
    use_torch_threads()
    groups = min(len(panels), even_parts(-(-len(a) // _BLOCK_ROWS)))
    out, out_row, _ = _flat(c)
    _multiply(out, out_row, *c.shape, *_flat(a), panels.numpy(), groups, int(keep))
    return c


def _flat(x: Tensor) -> tuple[np.ndarray, int, int]:
    """x [N, K] as one array over its memory, and how far its rows and its columns are apart."""
    x = x.detach()
    if 1 not in x.stride():
        x = x.contiguous()
    (rows, columns), (row, column) = x.shape, x.stride()
    span = 1 + (rows - 1) * row + (columns - 1) * column
    return lent(x.as_strided((span if x.numel() else 0,), (1,))), row, column


@compiled
def _pack(b, row, column, panels, N):
    """panels of b, whose rows are `row` elements apart and whose columns `column`."""
    num_panels, K, _ = panels.shape
    parts = -(-K // _BLOCK_INNER)
    for unit in prange(num_panels * parts):
        panel, start = unit // parts, unit % parts * _BLOCK_INNER
        out, first, end = panels[panel], panel * COLUMNS, min(K, start + _BLOCK_INNER)
        filled = min(COLUMNS, N - first)
        whole = end - (end - start) % SIDE if column == 1 and filled == COLUMNS else start
        for k in range(start, whole, SIDE):
            for n in range(0, COLUMNS, SIDE):
                at = (panel * K + k) * COLUMNS + n
                turn(panels, at, COLUMNS, b, (first + n) * row + k, row)
        for k in range(whole, end):
            at = first * row + k * column
            if row == 1 and filled == COLUMNS:
                copy_columns(panels, (panel * K + k) * COLUMNS, b, at)
            else:
                for n in range(filled):
                    out[k, n] = b[at + n * row]
        if filled < COLUMNS:
            out[start:end, filled:] = 0


@njit(inline="always")
def _add_edge(c, at, c_row, rows, columns, spare, keep):
    """A tile of which C has only some rows and columns."""
    for i in range(rows):
        for n in range(columns):
            before = c[at + i * c_row + n] if keep else _F(0)
            c[at + i * c_row + n] = before + spare[i, n]


@njit(inline="always")
def _stripes(block, a, at, row, column, rows, inner):
    """block [BLOCK_ROWS / ROWS, inner, ROWS] of `rows` rows of A, with zeros after them."""
    whole = rows - rows % ROWS
    if row == 1:
        for k in range(inner):
            for r in range(0, whole, ROWS):
                copy_rows(block, r * inner + k * ROWS, a, at + k * column + r)
    elif column == 1 and ROWS == SIDE:
        turned = inner - inner % SIDE
        for r in range(0, whole, ROWS):
            for k in range(0, turned, SIDE):
                turn(block, r * inner + k * ROWS, ROWS, a, at + r * row + k, row)
        for r in range(whole):
            for k in range(turned, inner):
                block[r // ROWS * inner * ROWS + k * ROWS + r % ROWS] = a[at + r * row + k]
    else:
        whole = 0
    if whole < rows:
        block[whole * inner : (rows + ROWS - 1) // ROWS * ROWS * inner] = 0
    for r in range(whole, rows):
        for k in range(inner):
            block[r // ROWS * inner * ROWS + k * ROWS + r % ROWS] = a[at + r * row + k * column]


@compiled
def _multiply(c, c_row, M, N, a, row, column, panels, groups, keep):
    """C [M, N] (+)= A [M, K] times what is packed, its panels in `groups`."""
    K = panels.shape[1]
    in_place = column == 1 and M % ROWS == 0 and row % _SAME_PLACE != 0
    per_group = -(-len(panels) // groups)
    for unit in prange(-(-M // _BLOCK_ROWS) * groups):
        first, group = unit // groups * _BLOCK_ROWS, unit % groups
        rows = min(_BLOCK_ROWS, M - first)
        block = np.empty(_BLOCK_INNER * _BLOCK_ROWS, np.float32)
        spare = np.empty((ROWS, COLUMNS), np.float32)
        for start in range(0, K, _BLOCK_INNER):
            inner, kept = min(_BLOCK_INNER, K - start), int(keep or start > 0)
            base = first * row + start * column
            if in_place:
                source, a_row, step, stripe = a, row, 1, ROWS * row
            else:
                _stripes(block, a, base, row, column, rows, inner)
                source, a_row, step, stripe, base = block, 1, ROWS, inner * ROWS, 0
            for panel in range(group * per_group, min((group + 1) * per_group, len(panels))):
                b_at, n = (panel * K + start) * COLUMNS, panel * COLUMNS
                width = min(COLUMNS, N - n)
                for r in range(0, rows, ROWS):
                    left = (source, base + r // ROWS * stripe, a_row, step)
                    at = (first + r) * c_row + n
                    if width == COLUMNS and r + ROWS <= rows:
                        add_tile(c, at, c_row, *left, panels, b_at, COLUMNS, inner, kept)
                    else:
                        add_tile(spare, 0, COLUMNS, *left, panels, b_at, COLUMNS, inner, 0)
                        _add_edge(c, at, c_row, min(ROWS, rows - r), width, spare, kept)
