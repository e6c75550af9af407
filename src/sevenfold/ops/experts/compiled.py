"""The experts over blocks of 32 rows that stay in a core's cache; fp32 on a CPU, by numba.

A block is held transposed, a row of it to a column: then the weights are the left operand of every
product, read where they lie, and what is done to each element runs along the columns.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numpy as np
from numba import njit, prange

from sevenfold.ops.compiled import compiled, exp32
from sevenfold.ops.tile import COLUMNS, ROWS, add_tile

BLOCK_ROWS = COLUMNS
_F = np.float32


@njit(inline="always")
def _times(out, weight, at, row, column, columns):
    """out = W columns for one block; W begins at element `at`, `row` and `column` are its steps."""
    for n in range(0, len(out), ROWS):
        first = (at + n * row, row, column)
        add_tile(out, n * COLUMNS, COLUMNS, weight, *first, columns, 0, COLUMNS, len(columns), 0)


@njit(inline="always")
def _columns(x, token, columns):
    """columns [D, BLOCK_ROWS] of x[token], zeros where there are fewer tokens."""
    for lane in range(BLOCK_ROWS):
        for d in range(len(columns)):
            columns[d, lane] = x[token[lane], d] if lane < len(token) else _F(0)


@compiled
def feed(x, token, gate_up_proj, down_proj, blocks, kept, rows):
    """rows [R, D]: what the expert of each block [expert, first, count] makes of x[token].

    kept [B, 2 F, BLOCK_ROWS] receives the first product, or has no blocks.
    """
    (_, F2, D), F = gate_up_proj.shape, down_proj.shape[2]
    for b in prange(len(blocks)):
        e, first, count = blocks[b]
        columns, hidden = np.empty((D, COLUMNS), np.float32), np.empty((F, COLUMNS), np.float32)
        gate_up = kept[b] if len(kept) else np.empty((F2, COLUMNS), np.float32)
        _columns(x, token[first : first + count], columns)
        _times(gate_up, gate_up_proj, e * F2 * D, D, 1, columns)
        for f in range(F):
            for lane in range(COLUMNS):
                gate = gate_up[f, lane]
                hidden[f, lane] = gate / (_F(1) + exp32(-gate)) * gate_up[F + f, lane]
        _times(columns, down_proj, e * D * F, F, 1, hidden)
        for lane in range(count):
            for d in range(D):
                rows[first + lane, d] = columns[d, lane]


@compiled
def combine(rows, row, weights, y):
    """y_t = sum_j w_tj rows[row_tj]; a row that does not exist adds nothing."""
    for t in prange(len(y)):
        y[t] = 0
        for j in range(row.shape[1]):
            if row[t, j] < len(rows):
                for d in range(y.shape[1]):
                    y[t, d] += weights[t, j] * rows[row[t, j], d]


@compiled
def feed_backward(
    dy, token, share, gate_up_proj, down_proj, blocks, kept, hidden, dgate_up, drows, dshare
):
    """One expert's blocks: share * hidden, and the gradients of gate_up, of its rows and shares."""
    (_, F2, D), F = gate_up_proj.shape, down_proj.shape[2]
    for b in prange(len(blocks)):
        e, first, count = blocks[b]
        columns, dhidden = np.empty((D, COLUMNS), np.float32), np.empty((F, COLUMNS), np.float32)
        weight, total = np.zeros(COLUMNS, np.float32), np.zeros(COLUMNS, np.float32)
        weight[:count] = share[first : first + count]
        _columns(dy, token[first : first + count], columns)
        _times(dhidden, down_proj, e * D * F, 1, F, columns)
        for f in range(F):
            for lane in range(COLUMNS):
                gate, up = kept[b, f, lane], kept[b, F + f, lane]
                dh = dhidden[f, lane]
                sigmoid = _F(1) / (_F(1) + exp32(-gate))
                silu = gate * sigmoid
                total[lane] += silu * up * dh
                dh *= weight[lane]
                hidden[b, f, lane] = weight[lane] * silu * up
                dgate_up[b, f, lane] = dh * up * (sigmoid + silu * (_F(1) - sigmoid))
                dgate_up[b, F + f, lane] = dh * silu
        _times(columns, gate_up_proj, e * F2 * D, 1, D, dgate_up[b])
        dshare[first : first + count] = total[:count]
        for lane in range(count):
            for d in range(D):
                drows[first + lane, d] = columns[d, lane]


@compiled
def weight_gradient(left, x, token, blocks, unit_rows, out):
    """out [N, D] = sum over one expert's blocks of left[b] [N, BLOCK_ROWS] times x[token].

    A thread makes unit_rows of N at once, and gathers x for itself.
    """
    N, D = out.shape
    for unit in prange(-(-N // unit_rows)):
        taken = np.empty((COLUMNS, D), np.float32)
        for b in range(len(blocks)):
            _, first, count = blocks[b]
            for lane in range(COLUMNS):
                for d in range(D):
                    taken[lane, d] = x[token[first + lane], d] if lane < count else _F(0)
            for d in range(0, D, COLUMNS):
                for n in range(unit * unit_rows, min((unit + 1) * unit_rows, N), ROWS):
                    at, left_at = n * D + d, (b * N + n) * COLUMNS
                    add_tile(
                        out, at, D, left, left_at, COLUMNS, 1, taken, d, D, COLUMNS, int(b > 0)
                    )
