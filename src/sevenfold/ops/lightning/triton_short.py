"""Lightning attention of one short row as a Triton kernel: all its tokens are one chunk.

What a row of up to MOST_TOKENS tokens takes is the wait for memory, not work, so a program has few
value columns, asks for keys, values and the state at once, and for queries a round ahead:

    O = ((Q K^T) * M) V + diag(a) Q S       S_n = decay^n S + K^T diag(b_n) V

with M and a as in triton_scan, and b_j = decay^(n - 1 - j) for j < n, else 0. S is the state before
the row, S_n that after n of its tokens: those that are kept, and the last, each from S itself.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.lightning.segments import Plan
from sevenfold.ops.lightning.triton_scan import decayed, power, rate
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_launched import launched
from sevenfold.ops.triton_overlap import wait_for_last

MOST_TOKENS = 128
MOST_KEYS = 128
_VALUES = 16  # columns of a program: 16 heads of 128 then fill an H100 or H200, in one wave
# Queries of a round. With 64 and more Triton (3.6) takes Hopper's own matrix instructions, and what
# this kernel then gave on an H200 was wrong; not so by the older ones.
_ROWS = 32


@triton.jit
def _rows(x, token, row, there, column, D: tl.constexpr):
    at = row.to(tl.int64)[:, None] * token + column[None, :]
    return tl.load(x + at, there[:, None] & (column < D)[None, :], other=0.0)


@launched
@triton.jit
def short_kernel(
    q, k, v, o, log_decay, scale, state_in, states, states_slot, slots, pool, pool_slot, table,
    stops, T, q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    BM: tl.constexpr, HAS_IN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One head of the row, BV of its value columns; table and stops as segments.Plan says."""
    head = tl.program_id(1).to(tl.int64)
    t, i, j = tl.arange(0, BT), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    log2_decay = rate(log_decay, head)
    wait_for_last(OVERLAPS)
    L, is_last = tl.load(table + 1), tl.load(table + 4)
    first_stop, end_stop = tl.load(table + 5), tl.load(table + 6)
    # Which tokens count is not known yet: what does not is read and left out, be it no number.
    kc = _rows(k + head * k_head, k_token, t, t < T, i, K)
    vc = _rows(v + head * v_head, v_token, t, t < T, j, V)
    cell, inside = i[:, None] * V + j[None, :], (i < K)[:, None] & (j < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_IN:
        S = tl.load(state_in + head * (K * V) + cell, inside, other=0.0)
    counts = (t < L)[:, None]
    kc, vc = tl.where(counts, kc, 0.0).to(kc.dtype), tl.where(counts, vc, 0.0).to(vc.dtype)
    met = S.to(kc.dtype)
    for first in range(0, L, BM):
        r = first + tl.arange(0, BM)
        qc = _rows(q + head * q_head, q_token, r, r < T, i, K)
        # Weights are rounded to the tokens' dtype next: the hardware's exponential will do.
        apart = r[:, None] - t[None, :]
        weight = tl.exp2(log2_decay * tl.maximum(apart, 0).to(tl.float32)) * scale
        P = tl.where(apart >= 0, tl.dot(qc, tl.trans(kc), input_precision="ieee") * weight, 0.0)
        entered = power(log2_decay, r + 1) * scale
        oc = tl.dot(qc, met, input_precision="ieee") * entered[:, None]
        oc = tl.dot(P.to(vc.dtype), vc, oc, input_precision="ieee")
        o_at = o + head * o_head + r.to(tl.int64)[:, None] * o_token + j[None, :]
        tl.store(o_at, oc.to(vc.dtype), (r < L)[:, None] & (j < V)[None, :])
    for stop in range(first_stop, end_stop + is_last):
        # The row behind the last stop is there, too.
        n, slot = tl.load(stops + 2 * stop), tl.load(stops + 2 * stop + 1).to(tl.int64)
        to = pool + slot * pool_slot
        if stop == end_stop:
            n, to = L, states + tl.load(slots) * states_slot
        aged = (vc.to(tl.float32) * power(log2_decay, n - 1 - t)[:, None]).to(vc.dtype)
        added = tl.trans(tl.dot(tl.trans(aged), kc, input_precision="ieee"))
        after = S * decayed(log2_decay * n.to(tl.float32)) + added
        tl.store(to + head * (K * V) + cell, after, inside)


def suits_short(q: Tensor, plan: Plan) -> bool:
    """Whether q [1, T, H, K] is a short row in 16 bits, which its plan leaves whole."""
    T, _, K = q.shape[1:]
    is_short = 0 < T <= MOST_TOKENS and 0 < K <= MOST_KEYS and len(plan.segments) == 1
    return is_short and q.itemsize == 2


def run_short(
    tokens: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor,
    scale: float,
    state_in: Tensor | None,
    left: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Plan],
) -> Tensor:
    """o [1, T, H, V] of a short row's tokens that count; writes their states.

    Args:
        tokens: q, k and v, whose last strides are 1.
        log_decay, scale: of the scan.
        state_in: [1, H, K, V] contiguous, not among those that are written.
        left: pool and slot [1] of the state after the last token that counts.
        kept: pool and plan of the others.
    """
    (q, k, v), (states, slots), (pool, plan) = tokens, left, kept
    (_, T, H, K), V = q.shape, v.shape[-1]
    o = q.new_empty(1, T, H, V)
    held = max(16, next_power_of_2(T))
    short_kernel[(cdiv(V, _VALUES), H)](
        q, k, v, o, log_decay, float(scale), log_decay if state_in is None else state_in,
        states, states.stride(0), slots, pool, pool.stride(0), plan.segments, plan.stops, T,
        *(stride for x in (q, k, v, o) for stride in x.stride()[1:3]),
        K=K, V=V, BK=max(16, next_power_of_2(K)), BV=_VALUES, BT=held,
        BM=min(held, _ROWS), HAS_IN=state_in is not None, num_warps=4, **overlapping(o),
    )  # fmt: skip
    return o
