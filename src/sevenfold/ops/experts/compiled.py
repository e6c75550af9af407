"""The experts over blocks of 32 rows that stay in a core's cache; fp32 on a CPU, by numba.

A block is held transposed, a row of it to a column: then the weights are the left operand of every
product, read where they lie, and what is done to each element runs along the columns.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numpy as np
from numba import njit, prange

from sevenfold.ops.compiled import compiled, exp32
from sevenfold.ops.tile import COLUMNS, ROWS, SIDE, add_tile, add_tiles, copy_columns, turn

BLOCK_ROWS = COLUMNS
_UNIT_ROWS = 64  # of a weight's gradient: what a thread makes at once
_AT_ONCE = 8  # blocks in one sum: their panel of 32 KB stays in a core's first cache
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
    D = len(columns)
    rows = np.zeros((SIDE, D), np.float32)
    for lane in range(0, BLOCK_ROWS, SIDE):
        for i in range(SIDE):
            if lane + i < len(token):
                rows[i] = x[token[lane + i]]
            else:
                rows[i] = 0
        for d in range(0, D, SIDE):
            turn(columns, d * COLUMNS + lane, COLUMNS, rows, d, D)


@njit(inline="always")
def _rows(columns, count, rows, first):
    """rows[first + lane] of the first `count` columns."""
    D = len(columns)
    turned = np.empty((SIDE, D), np.float32)
    for lane in range(0, count, SIDE):
        for d in range(0, D, SIDE):
            turn(turned, d, D, columns, d * COLUMNS + lane, COLUMNS)
        for i in range(min(SIDE, count - lane)):
            rows[first + lane + i] = turned[i]


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
        _rows(columns, count, rows, first)


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
        _times(columns, gate_up_proj, e * F2 * D, 1, D, dgate_up[b][:F2])
        dshare[first : first + count] = total[:count]
        _rows(columns, count, drows, first)


@compiled
def gather(x, token, blocks, panels):
    """panels [D / COLUMNS, B', BLOCK_ROWS, COLUMNS] of x[token], zeros where blocks have fewer."""
    size = panels.shape[1]
    for b in prange(len(blocks)):
        _, first, count = blocks[b]
        for lane in range(BLOCK_ROWS):
            for panel in range(len(panels)):
                at = ((panel * size + b) * BLOCK_ROWS + lane) * COLUMNS
                if lane < count:
                    copy_columns(panels, at, x, token[first + lane] * x.shape[1] + panel * COLUMNS)
                else:
                    panels[panel, b, lane] = 0


@compiled
def weight_gradient(left, panels, B, out):
    """out [N, D] = sum over B blocks of left[b] [N, BLOCK_ROWS] times what is gathered."""
    num_panels, size, _, _ = panels.shape
    N, part = len(out), left.shape[1] * BLOCK_ROWS
    for unit in prange(-(-N // _UNIT_ROWS)):
        for b in range(0, B, _AT_ONCE):
            parts = min(_AT_ONCE, B - b)
            for panel in range(num_panels):
                right = (panel * size + b) * BLOCK_ROWS * COLUMNS
                for n in range(unit * _UNIT_ROWS, min((unit + 1) * _UNIT_ROWS, N), ROWS):
                    add_tiles(
                        out,
                        n * out.shape[1] + panel * COLUMNS,
                        out.shape[1],
                        left,
                        b * part + n * BLOCK_ROWS,
                        BLOCK_ROWS,
                        part,
                        panels,
                        right,
                        BLOCK_ROWS,
                        parts,
                        int(b > 0),
                    )
