"""Lightning attention as one Triton kernel that scans in either direction, for any width.

A chunk has C tokens, of which r are the segment's; e counts its tokens from where the scan enters.
In the forward direction a program computes, chunk by chunk,

    O = ((Q K^T) * M) V + diag(a) Q S        M_ij = decay^(e_i - e_j) for e_i >= e_j, else 0
    S = decay^r S + K^T diag(b) V            a_i = decay^(e_i + 1)    b_j = decay^(r - 1 - e_j)

and in reverse, where S already holds the next token's decay: a_i = decay^e_i, b_j =
decay^(r - e_j). All exponents are >= 0. The backward consists of such scans with the inputs in
other roles (docs/kernels.md).

A segment inside a sequence needs the state before it. Where OUTPUT is False the kernel computes
what pieces of the segments add to the states after them, but for the tokens whose weight at the
segment's end is below the rounding of their dtype. chain_kernel adds these up along a sequence.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sevenfold.ops.triton_launched import launched

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rate(log_decay, head):
    """log2 of a head's decay; finite, so that an infinite rate times no distance is 0."""
    return tl.maximum(tl.load(log_decay + head) * _LOG2E, -1e30)


@triton.jit
def _less_one(exponent):
    """2^exponent - 1 and whether it is right to the last digits, which it is near 0."""
    x = exponent * _LN2
    near = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720))))
    return x * (1 + x * near), x > -0.25


@triton.jit
def decayed(exponent):
    """2^exponent for an exponent <= 0, to the last bit or two.

    A slow head multiplies its state by such a number some 1e4 times, and the hardware's exponential
    is off by up to 2^-22 each time, in the same direction; near zero a polynomial is not.
    """
    less, is_near = _less_one(exponent)
    return tl.where(is_near, 1 + less, tl.exp2(exponent))


@triton.jit
def decayed_by(exponent):
    """2^exponent - 1: what a decay takes, in digits that a number close to 1 has no room for."""
    less, is_near = _less_one(exponent)
    return tl.where(is_near, less, tl.exp2(exponent) - 1)


@triton.jit
def power(log2_decay, distance):
    """decay^distance; 0 where the distance is negative."""
    exponent = log2_decay * tl.maximum(distance, 0).to(tl.float32)
    return tl.where(distance >= 0, decayed(exponent), 0.0)


@triton.jit
def reach(log2_decay, horizon):
    """How many of the last tokens weigh 2^-horizon or more."""
    return tl.minimum(horizon / tl.maximum(-log2_decay, 1e-9), 1e9).to(tl.int32)


@triton.jit
def forgotten(log2_decay, length, ahead, horizon, C: tl.constexpr):
    """How many of a piece's first tokens weigh below 2^-horizon where its segment ends.

    A multiple of C, unless it is the whole length; `ahead` tokens follow the piece.
    """
    old = tl.minimum(tl.maximum(length + ahead - reach(log2_decay, horizon), 0), length)
    return tl.where(old == length, length, old // C * C)


@triton.jit
def _rows(x, token_stride, rows, inside, columns, D: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * token_stride + columns[None, :]
    return tl.load(x + at, inside[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _fold(S, lost, k, v, log2_decay, e, size, gain, REVERSE: tl.constexpr):
    """The state after a chunk of `size` tokens, whose rows of k and v beyond are zero.

    An fp32 state keeps what its sums lose beside it (Neumaier's summation, with decay): it may meet
    a hundred thousand chunks.
    """
    to_exit = size - e if REVERSE else size - 1 - e
    vs = v.to(tl.float32) * (power(log2_decay, to_exit) * gain)[:, None]
    exponent = log2_decay * size.to(tl.float32)
    if v.dtype == tl.float32:
        # Not into the large state one token after another: each sum would round at its size.
        added = tl.dot(tl.trans(k), vs, input_precision="ieee")
        # Nor times a rounded decay: its error is the same in every chunk.
        less = tl.zeros_like(S) + decayed_by(exponent)
        change = tl.fma(S, less, added)
        total = S + change
        rest = total - S
        lost += tl.fma(lost, less, (S - (total - rest)) + (change - rest))
        S = total
    else:
        S = tl.dot(tl.trans(k), vs.to(v.dtype), S * decayed(exponent))
    return S, lost


@triton.jit
def _scan(
    S, q, k, v, o, q_token, k_token, v_token, o_token, log2_decay, scale, start, end, begin, until,
    v_columns, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """The state after the tokens from `begin` to `until`, counted from where the scan enters."""
    ar = tl.arange(0, C)
    e = C - 1 - ar if REVERSE else ar
    k_columns = tl.arange(0, BK)
    within = power(log2_decay, e[:, None] - e[None, :]) * scale
    entered = power(log2_decay, e) if REVERSE else power(log2_decay, e + 1) * scale
    gain = scale if REVERSE else 1.0
    lost = tl.zeros_like(S)
    for chunk in range(tl.cdiv(until - begin, C)):
        done = begin + chunk * C
        size = tl.minimum(until - done, C)
        rows = (end - done - C if REVERSE else start + done) + ar
        inside = e < size
        kc = _rows(k, k_token, rows, inside, k_columns, K)
        vc = _rows(v, v_token, rows, inside, v_columns, V)
        if OUTPUT:
            qc = _rows(q, q_token, rows, inside, k_columns, K)
            P = tl.dot(qc, tl.trans(kc), input_precision="ieee") * within
            oc = tl.dot(qc, S.to(qc.dtype), input_precision="ieee") * entered[:, None]
            oc = tl.dot(P.to(vc.dtype), vc, oc, input_precision="ieee")
            at = rows.to(tl.int64)[:, None] * o_token + v_columns[None, :]
            tl.store(o + at, oc.to(vc.dtype), inside[:, None] & (v_columns < V)[None, :])
        S, lost = _fold(S, lost, kc, vc, log2_decay, e, size, gain, REVERSE)
    if v.dtype.element_ty == tl.float32:
        S += lost
    return S


@launched
@triton.jit
def scan_kernel(
    q, k, v, o, log_decay, scale, horizon, state_in, state_between, state_out, pool, pool_slot,
    table, stops, q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head,
    state_k, state_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, HAS_IN: tl.constexpr, HAS_BETWEEN: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_STOPS: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """One segment of one head, BV of its value columns.

    Rows of `table` and of `stops` as segments.Plan says. States are [N, H, K, V] in memory, or
    [N, H, V, K] where state_k is 1.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    row = table + (tl.program_id(0) // tiles) * 8
    head = tl.program_id(1)
    start, end, sequence = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    slot, is_last = tl.load(row + 3), tl.load(row + 4)
    log2_decay = rate(log_decay, head)
    v_columns = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    k_columns = tl.arange(0, BK)
    q += head.to(tl.int64) * q_head
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    o += head.to(tl.int64) * o_head
    H = tl.num_programs(1)
    cell = k_columns[:, None] * state_k + v_columns[None, :] * state_v
    inside = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    matrix = (sequence.to(tl.int64) * H + head) * (K * V) + cell
    between = (slot.to(tl.int64) * H + head) * (K * V) + cell
    S = tl.zeros([BK, BV], dtype=tl.float32)
    done = 0
    if OUTPUT:
        if HAS_IN:
            S += tl.load(state_in + matrix, inside & (slot < 0), other=0.0)
        if HAS_BETWEEN:
            S += tl.load(state_between + between, inside & (slot >= 0), other=0.0)
    else:
        done = forgotten(log2_decay, end - start, tl.load(row + 7), horizon, C)
    if HAS_STOPS:
        for at in range(tl.load(row + 5), tl.load(row + 6)):
            until = tl.load(stops + 2 * at)
            S = _scan(
                S, q, k, v, o, q_token, k_token, v_token, o_token, log2_decay, scale, start, end,
                done, until, v_columns, K, V, BK, C, REVERSE, OUTPUT,
            )  # fmt: skip
            kept = tl.load(stops + 2 * at + 1).to(tl.int64) * pool_slot + head * (K * V)
            tl.store(pool + kept + cell, S, inside)
            done = until
    S = _scan(
        S, q, k, v, o, q_token, k_token, v_token, o_token, log2_decay, scale, start, end,
        done, end - start, v_columns, K, V, BK, C, REVERSE, OUTPUT,
    )  # fmt: skip
    if HAS_OUT:
        tl.store(state_out + matrix, S, inside & (is_last == 1))
    if OUTPUT == False:  # noqa: E712, a constexpr has no `not`
        tl.store(state_between + between, S, inside & (done < end - start))


@triton.jit
def _added(state_between, slot, first, last, pieces, kept, head, H, cell, CELLS: tl.constexpr):
    """What a piece adds; 0 beyond the last one and where it is forgotten: nobody wrote there."""
    at = (slot.to(tl.int64) * H + head) * CELLS + cell
    counts = (slot < last) & (pieces - 1 - (slot - first) % pieces < kept)
    return tl.load(state_between + at, (cell < CELLS) & counts, other=0.0)


@launched
@triton.jit
def chain_kernel(
    state_in, state_between, log_decay, horizon, chains,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, HAS_IN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Turn what each segment's last piece adds into the state after the segment.

    S_(i + 1) = decay^r S_i + A_i        r tokens of a piece, A_i = 0 where it is forgotten

    OVERLAPS: it may have started before the kernel that writes the pieces has ended.
    """
    row = chains + tl.program_id(0) * 5
    sequence, first = tl.load(row), tl.load(row + 1)
    last, size, pieces = first + tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    head, H = tl.program_id(1), tl.num_programs(1)
    log2_decay = rate(log_decay, head)
    decay = decayed(log2_decay * size.to(tl.float32))
    # As many of a segment's last pieces as are not forgotten as a whole.
    kept = tl.cdiv(reach(log2_decay, horizon), size)
    cell = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    S = tl.zeros([BLOCK], dtype=tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    if HAS_IN:
        S = tl.load(state_in + (sequence.to(tl.int64) * H + head) * CELLS + cell, cell < CELLS)
    for step in range(tl.cdiv(last - first, 4)):
        at = first + step * 4
        # Four loads at once: one after another they would take longer than everything else.
        added = (
            _added(state_between, at, first, last, pieces, kept, head, H, cell, CELLS),
            _added(state_between, at + 1, first, last, pieces, kept, head, H, cell, CELLS),
            _added(state_between, at + 2, first, last, pieces, kept, head, H, cell, CELLS),
            _added(state_between, at + 3, first, last, pieces, kept, head, H, cell, CELLS),
        )
        for i in tl.static_range(4):
            S = S * decay + added[i]
            to = ((at + i).to(tl.int64) * H + head) * CELLS + cell
            ends = (at + i < last) & ((at + i - first) % pieces == pieces - 1)
            tl.store(state_between + to, S, (cell < CELLS) & ends)
