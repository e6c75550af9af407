"""Lightning attention as one Triton kernel that scans in either direction, for any width.

A chunk has C tokens, of which r are the segment's; e counts its tokens from where the scan enters.
In the forward direction a program computes, chunk by chunk,

    O = ((Q K^T) * M) V + diag(a) Q S        M_ij = decay^(e_i - e_j) for e_i >= e_j, else 0
    S = decay^r S + K^T diag(b) V            a_i = decay^(e_i + 1)    b_j = decay^(r - 1 - e_j)

and in reverse, where S already holds the next token's decay: a_i = decay^e_i, b_j =
decay^(r - e_j). All exponents are >= 0. The backward consists of such scans with the inputs in
other roles (docs/kernels.md).

A segment that starts inside its sequence first scans the tokens before it, no further back than
where their weight falls below fp32's rounding.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_HORIZON_LOG2 = tl.constexpr(24.0)
# A token of a warm-up costs about this part of a token with output.
_WARM_UP_COST = tl.constexpr(0.45)


@triton.jit
def rate(log_decay, head):
    """log2 of a head's decay; finite, so that an infinite rate times no distance is 0."""
    return tl.maximum(tl.load(log_decay + head) * _LOG2E, -1e30)


@triton.jit
def power(log2_decay, distance):
    """decay^distance; 0 where the distance is negative."""
    exponent = log2_decay * tl.maximum(distance, 0).to(tl.float32)
    return tl.where(distance >= 0, tl.exp2(exponent), 0.0)


@triton.jit
def window(log2_decay, length, C: tl.constexpr):
    """Tokens, a multiple of C, after which a weight is below fp32's rounding; length at most."""
    tokens = _HORIZON_LOG2 / tl.maximum(-log2_decay, 1e-9)
    chunks = tl.minimum(tokens / C, 1e9).to(tl.int32) + 1
    return tl.minimum(chunks, tl.cdiv(length, C)) * C


@triton.jit
def bounds(length, index, count, warm_up, C: tl.constexpr):
    """First token and end of a segment, counted from where the scan enters its sequence.

    The first segment has no warm-up, so it gets as many tokens more as the others' costs.
    """
    others = tl.minimum(warm_up * _WARM_UP_COST, length / count)
    longer = (length + (count - 1) * others) / count
    first = tl.cdiv(longer.to(tl.int32), C) * C
    rest = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), tl.maximum(count - 1, 1)), C) * C
    begin = tl.where(index == 0, 0, first + (index - 1) * rest)
    end = tl.where(index == count - 1, length, first + index * rest)
    return tl.minimum(begin, length), tl.minimum(end, length)


@triton.jit
def _rows(x, token_stride, rows, first, end, columns, D: tl.constexpr):
    inside = (rows >= first) & (rows < end)
    at = rows.to(tl.int64)[:, None] * token_stride + columns[None, :]
    return tl.load(x + at, inside[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _state_at(row, column, row_stride, column_stride):
    return row[:, None] * row_stride + column[None, :] * column_stride


@triton.jit
def _fold(S, k, v, log2_decay, e, size, gain, REVERSE: tl.constexpr):
    """The state after a chunk of `size` tokens, whose rows of k and v beyond are zero."""
    to_exit = size - e if REVERSE else size - 1 - e
    vs = v.to(tl.float32) * (power(log2_decay, to_exit) * gain)[:, None]
    decayed = S * tl.exp2(log2_decay * size.to(tl.float32))
    return tl.dot(tl.trans(k), vs.to(v.dtype), decayed, input_precision="ieee")


@triton.jit
def _scan_only(
    S,
    k,
    v,
    k_token,
    v_token,
    log2_decay,
    gain,
    first,
    end,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    v_columns,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The state after the tokens from first to end, without output."""
    ar = tl.arange(0, C)
    e = C - 1 - ar if REVERSE else ar
    k_columns = tl.arange(0, BK)
    for chunk in range(tl.cdiv(end - first, C)):
        t = end - (chunk + 1) * C if REVERSE else first + chunk * C
        size = tl.minimum(end - first - chunk * C, C)
        kc = _rows(k, k_token, t + ar, first, end, k_columns, K)
        vc = _rows(v, v_token, t + ar, first, end, v_columns, V)
        S = _fold(S, kc, vc, log2_decay, e, size, gain, REVERSE)
    return S


@triton.jit
def _scan(
    S,
    q,
    k,
    v,
    o,
    q_token,
    k_token,
    v_token,
    o_token,
    log2_decay,
    scale,
    first,
    end,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    v_columns,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Write the output of the tokens from first to end; return the state after them."""
    ar = tl.arange(0, C)
    e = C - 1 - ar if REVERSE else ar
    k_columns = tl.arange(0, BK)
    within = power(log2_decay, e[:, None] - e[None, :]) * scale
    entered = power(log2_decay, e) if REVERSE else power(log2_decay, e + 1) * scale
    gain = scale if REVERSE else 1.0
    for chunk in range(tl.cdiv(end - first, C)):
        t = end - (chunk + 1) * C if REVERSE else first + chunk * C
        size = tl.minimum(end - first - chunk * C, C)
        rows = t + ar
        qc = _rows(q, q_token, rows, first, end, k_columns, K)
        kc = _rows(k, k_token, rows, first, end, k_columns, K)
        vc = _rows(v, v_token, rows, first, end, v_columns, V)
        P = tl.dot(qc, tl.trans(kc), input_precision="ieee") * within
        oc = tl.dot(qc, S.to(qc.dtype), input_precision="ieee") * entered[:, None]
        oc = tl.dot(P.to(vc.dtype), vc, oc, input_precision="ieee")
        inside = ((rows >= first) & (rows < end))[:, None] & (v_columns < V)[None, :]
        at = rows.to(tl.int64)[:, None] * o_token + v_columns[None, :]
        tl.store(o + at, oc.to(vc.dtype), inside)
        S = _fold(S, kc, vc, log2_decay, e, size, gain, REVERSE)
    return S


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    o,
    log_decay,
    scale,
    state_in,
    state_out,
    pool,
    table,
    stops,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    o_token,
    o_head,
    state_k,
    state_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_IN: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_STOPS: tl.constexpr,
):
    """One segment of one head, BV of its value columns.

    Rows of `table` and of `stops` as segments.Segments says. States are [N, H, K, V] in memory, or
    [N, H, V, K] where state_k is 1.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    row = table + (tl.program_id(0) // tiles) * 7
    head = tl.program_id(1)
    sequence, start, stop = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    index, count = tl.load(row + 3), tl.load(row + 4)
    log2_decay = rate(log_decay, head)
    reach = window(log2_decay, stop - start, C)
    begin, end = bounds(stop - start, index, count, reach, C)
    warm = tl.minimum(reach, begin)
    v_columns = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    k_columns = tl.arange(0, BK)
    q += head.to(tl.int64) * q_head
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    o += head.to(tl.int64) * o_head
    cell = _state_at(k_columns, v_columns, state_k, state_v)
    inside = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    matrix = (sequence.to(tl.int64) * tl.num_programs(1) + head) * (K * V)
    S = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_IN:
        S = tl.load(state_in + matrix + cell, inside & (warm == begin), other=0.0)
    first = stop - begin if REVERSE else start + begin - warm
    last = stop - begin + warm if REVERSE else start + begin
    gain = scale if REVERSE else 1.0
    S = _scan_only(
        S, k, v, k_token, v_token, log2_decay, gain, first, last, K, V, BK, v_columns, C, REVERSE
    )
    first = stop - end if REVERSE else start + begin
    last = stop - begin if REVERSE else start + end
    if HAS_STOPS:
        for at in range(tl.load(row + 5), tl.load(row + 6)):
            here = start + tl.load(stops + 2 * at)
            if (here > first) & (here <= last):
                S = _scan(
                    S, q, k, v, o, q_token, k_token, v_token, o_token, log2_decay, scale,
                    first, here, K, V, BK, v_columns, C, REVERSE,
                )  # fmt: skip
                first = here
            if (here == first) & (here > start + begin):
                slot = tl.load(stops + 2 * at + 1).to(tl.int64) * tl.num_programs(1) + head
                tl.store(pool + slot * (K * V) + cell, S, inside)
    S = _scan(
        S, q, k, v, o, q_token, k_token, v_token, o_token, log2_decay, scale,
        first, last, K, V, BK, v_columns, C, REVERSE,
    )  # fmt: skip
    if HAS_OUT and index == count - 1:
        tl.store(state_out + matrix + cell, S, inside)
