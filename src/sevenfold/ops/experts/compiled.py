"""The experts over blocks of 32 rows that stay in a core's cache; fp32 on a CPU, by numba.

A block is held transposed, a row of it to a column: then the weights are the left operand of every
product, read where they lie, and what is done to each element runs along the columns.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import numpy as np
from numba import njit, prange

from sevenfold.ops.compiled import compiled, exp32
from sevenfold.ops.lanes import silu_times, silu_times_grad
from sevenfold.ops.tile import COLUMNS, ROWS, SIDE, add_tile, add_tiles, copy_columns, turn

BLOCK_ROWS = COLUMNS
_UNIT_ROWS = 64  # of a weight's gradient: what a thread makes at once
_AT_ONCE = 8  # blocks in one sum: their panel of 32 KB stays in a core's first cache
# Blocks that meet a part of the weights in turn: it comes from afar once for all of them.
_TOGETHER, _TOGETHER_ELEMENTS = 4, 2**17  # 512 KB of columns and hidden
_GATES, _OUTPUTS = 32, 64  # rows of a weight in such a part
_INNER = 256  # of a sum at once: a panel of 32 KB stays in a core's first cache
_F = np.float32


def units(num_blocks: int, width: int, threads: int) -> int:
    """In how many parts feed takes its blocks: few, of equal size for the threads.

    Args:
        num_blocks: at least 0.
        width: D + F.
        threads: that share them.
    """
    together = max(1, min(_TOGETHER, _TOGETHER_ELEMENTS // (width * COLUMNS)))
    return min(num_blocks, -(-num_blocks // (together * threads)) * threads)


@njit(inline="always")
def _times(out, out_at, count, weight, at, row, column, columns, columns_at, inner):
    """`count` rows of out = W columns for one block, summed over `inner` of them.

    Each begins at element *_at; `row` and `column` are W's steps.
    """
    for k in range(0, inner, _INNER):
        part, right = min(_INNER, inner - k), columns_at + k * COLUMNS
        for n in range(0, count, ROWS):
            to, first = out_at + n * COLUMNS, (at + n * row + k * column, row, column)
            add_tile(out, to, COLUMNS, weight, *first, columns, right, COLUMNS, part, int(k > 0))


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


@njit(inline="always")
def _feed_together(x, token, gate_up_proj, down_proj, blocks, kept, rows, begin, end):
    """What feed makes of the blocks from `begin` to `end`."""
    (_, F2, D), F = gate_up_proj.shape, down_proj.shape[2]
    columns = np.empty((end - begin, D, COLUMNS), np.float32)
    hidden = np.empty((end - begin, F, COLUMNS), np.float32)
    products = kept if len(kept) else np.empty((1, 2 * _GATES, COLUMNS), np.float32)
    for b in range(begin, end):
        _, first, count = blocks[b]
        _columns(x, token[first : first + count], columns[b - begin])
    for f in range(0, F, _GATES):
        for b in range(begin, end):
            e, at = blocks[b, 0], (b - begin) * D * COLUMNS
            gate, up = 0, _GATES * COLUMNS
            if len(kept):
                gate, up = (b * F2 + f) * COLUMNS, (b * F2 + F + f) * COLUMNS
            for to, row in ((gate, e * F2 + f), (up, e * F2 + F + f)):
                _times(products, to, _GATES, gate_up_proj, row * D, D, 1, columns, at, D)
            to = ((b - begin) * F + f) * COLUMNS
            silu_times(hidden, to, products, gate, up, _GATES * COLUMNS)
    for d in range(0, D, _OUTPUTS):
        for b in range(begin, end):
            to, weight = ((b - begin) * D + d) * COLUMNS, (blocks[b, 0] * D + d) * F
            count = min(_OUTPUTS, D - d)
            at = (b - begin) * F * COLUMNS
            _times(columns, to, count, down_proj, weight, F, 1, hidden, at, F)
    for b in range(begin, end):
        _, first, count = blocks[b]
        _rows(columns[b - begin], count, rows, first)


@compiled
def feed(x, token, gate_up_proj, down_proj, blocks, kept, rows, units):
    """rows [R, D]: what the expert of each block [expert, first, count] makes of x[token].

    kept [B, 2 F, BLOCK_ROWS] receives the first product, or has no blocks. The blocks are taken in
    `units` of equal size.
    """
    for unit in prange(units):
        begin, end = unit * len(blocks) // units, (unit + 1) * len(blocks) // units
        _feed_together(x, token, gate_up_proj, down_proj, blocks, kept, rows, begin, end)


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
        _times(dhidden, 0, F, down_proj, e * D * F, 1, F, columns, 0, D)
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
        right = b * dgate_up.shape[1] * COLUMNS
        _times(columns, 0, D, gate_up_proj, e * F2 * D, 1, D, dgate_up, right, F2)
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


@compiled
def swiglu_rows(gate_up, hidden):
    """hidden [R, F] = silu(gate) up of gate_up [R, 2 F]."""
    R, F = hidden.shape
    for n in prange(R):
        silu_times(hidden, n * F, gate_up, 2 * n * F, (2 * n + 1) * F, F)


@compiled
def swiglu_rows_backward(gate_up, share, dhidden, hidden, dgate_up, dshare):
    """share * hidden, and the gradients of gate_up and share, of rows as in swiglu_rows."""
    R, F = hidden.shape
    for n in prange(R):
        gate, up = 2 * n * F, (2 * n + 1) * F
        dshare[n] = silu_times_grad(dgate_up, gate_up, gate, up, dhidden, n * F, share[n], hidden)
