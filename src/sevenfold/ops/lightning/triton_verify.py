"""Draft tokens verified from the state before the draft: the Triton form."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.lightning.triton_decode_common import (
    check_runnable,
    contiguous_widths,
    fold,
    load_log_decay,
    pool_arguments,
    power,
    tuning,
    weigh,
)
from sevenfold.ops.lightning.triton_fold_int8 import fold_int8
from sevenfold.ops.row_launch import next_power_of_2

DRAFT_ROWS = 16  # the least that a tensor core's product takes


@triton.jit
def _rows_to_keep(count, accepted, b, A, R: tl.constexpr, BR: tl.constexpr):
    """Where the ring holds the i-th token that the state lacks, and how many there are."""
    i = tl.arange(0, BR)
    held = tl.load(count)
    picked = (i >= held) & (i - held < A)
    drafted = tl.load(accepted + b * A + i - held, mask=picked, other=-1)
    chosen = picked & (drafted >= 0) & (held + drafted < R)
    source = tl.where(i < held, i, tl.where(chosen, held + drafted, 0))
    return source, held + tl.sum(chosen.to(tl.int32))


@triton.jit
def _visible(ancestors, b, T, BT: tl.constexpr, TREE: tl.constexpr):
    """[BT, BT] whether row t sees draft token s, and from how many tokens away; depth [BT]."""
    t = tl.arange(0, BT)
    if TREE:
        at = ancestors + (b * T + t[:, None]) * T + t[None, :]
        sees = tl.load(at, mask=(t[:, None] < T) & (t[None, :] < T), other=0) != 0
    else:
        sees = (t[None, :] <= t[:, None]) & (t[:, None] < T)
    depth = tl.sum(sees.to(tl.int32), axis=1) - 1
    column = tl.sum(tl.where(t[:, None] == t[None, :], depth[:, None], 0), axis=0)
    return sees, tl.where(sees, depth[:, None] - column[None, :], 0), tl.maximum(depth, 0)


@triton.jit
def _products(q, q_token, T, query, x, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr):
    """Each query [BT, BK] with each column of x [BK, N].

    A tensor core's tf32 holds queries of 16 bits exactly, and more of a state than the output does.
    In fp32 each sum is a tree's: a chain of K additions would lose more than the eager form does.
    """
    if query.dtype == tl.float32:
        ik, t = tl.arange(0, BK), tl.arange(0, BT)[:, None]
        got = tl.zeros([BT, x.shape[1]], tl.float32)
        for j in range(BT):
            row = tl.load(q + j * q_token + ik, mask=(ik < K) & (j < T), other=0.0)
            got = tl.where(t == j, tl.sum(row[:, None] * x, axis=0)[None, :], got)
    else:
        got = tl.dot(query.to(x.dtype), x, input_precision="tf32")
    return got


@triton.jit
def _columns(
    state, row_scale, ring_v, q, v, out, query, keys, past, near, source, depth, P, rate, scale,
    q_token, v_token, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    BT: tl.constexpr, STAGES: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The outputs, BV columns at a time; with FOLD the state's also become those P tokens later.

    A fold reads the state once too, and needs more registers for a column than its absence does.
    """
    ik, iv, i, t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR), tl.arange(0, BT)
    exact: tl.constexpr = "ieee" if query.dtype == tl.float32 else "tf32"
    met, decay = power(rate, (P + 1 + depth).to(tl.float32)), power(rate, P.to(tl.float32))
    if FOLD:
        weighted = weigh(keys, P, rate, BR)
    if row_scale is not None:
        step = tl.load(row_scale + ik, mask=ik < K, other=0.0)[:, None]
    for start in tl.range(0, V, BV, num_stages=STAGES):
        in_v = (start + iv < V)[None, :]
        at = state + ik[:, None] * V + start + iv[None, :]
        S = tl.load(at, mask=(ik < K)[:, None] & in_v, other=0.0)
        if row_scale is not None:
            S = S.to(tl.float32) * step
        at_values = ring_v + source[:, None] * V + start + iv[None, :]
        values = tl.load(at_values, mask=(i < P)[:, None] & in_v, other=0.0)
        v_at = v + t[:, None] * v_token + start + iv[None, :]
        drafted = tl.load(v_at, mask=(t < T)[:, None] & in_v, other=0.0).to(tl.float32)
        got = met[:, None] * _products(q, q_token, T, query, S, K, BK, BT)
        got = tl.dot(past, values.to(tl.float32), got, input_precision=exact)
        got = scale * tl.dot(near, drafted, got, input_precision=exact)
        out_at = out + t[:, None] * H * V + start + iv[None, :]
        tl.store(out_at, got.to(out.dtype.element_ty), mask=(t < T)[:, None] & in_v)
        if FOLD:
            tl.store(at, fold(S, decay, weighted, values), mask=(ik < K)[:, None] & in_v)


@triton.jit
def _verify_kernel(
    q, k, v, log_decay, state, ring_k, ring_v, count, row_scale, slots, accepted, ancestors, o,
    scale, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    state_slot, keys_slot, values_slot, count_slot, scale_slot, T, A, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, WV: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, TREE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns one head of one slot, its ring and its cursor: nobody else touches them."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    slot = tl.load(slots + b).to(tl.int64)
    ik, iv, i, t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR), tl.arange(0, BT)
    in_k, in_t = ik < K, t < T
    out = o + b * T * H * V + h * V
    if slot < 0:
        for start in range(0, V, BV):
            nothing = tl.zeros([BT, BV], o.dtype.element_ty)
            at = out + t[:, None] * H * V + start + iv[None, :]
            tl.store(at, nothing, mask=in_t[:, None] & (start + iv < V)[None, :])
        return
    rate, count = load_log_decay(log_decay, h), count + slot * count_slot + h
    state += slot * state_slot + h * K * V
    ring_k += slot * keys_slot + h * R * K
    ring_v += slot * values_slot + h * R * V
    source, P = _rows_to_keep(count, accepted, b, A, R, BR)
    live, full = i < P, P + T > R
    q += b * q_row + h * q_head
    q_at = q + t[:, None] * q_token + ik[None, :]
    query = tl.load(q_at, mask=in_t[:, None] & in_k[None, :], other=0.0)
    k_at = k + b * k_row + h * k_head + t[None, :] * k_token + ik[:, None]
    draft = tl.load(k_at, mask=in_k[:, None] & in_t[None, :], other=0.0)
    inside = in_k[:, None] & live[None, :]
    keys = tl.load(ring_k + source[None, :] * K + ik[:, None], mask=inside, other=0.0)
    sees, distance, depth = _visible(ancestors, b, T, BT, TREE)
    near = _products(q, q_token, T, query, draft, K, BK, BT)
    near = tl.where(sees, power(rate, distance.to(tl.float32)), 0.0) * near
    distance = tl.where(live[None, :], P + depth[:, None] - i[None, :], 0).to(tl.float32)
    past = _products(q, q_token, T, query, keys, K, BK, BT)
    past = tl.where(live[None, :], power(rate, distance), 0.0) * past
    v += b * v_row + h * v_head
    if row_scale is not None:
        row_scale += slot * scale_slot + h * K
        _columns(state, row_scale, ring_v, q, v, out, query, keys, past, near, source, depth, P,
                 rate, scale, q_token, v_token, T, H, K, V, BK, BV, BR, BT, STAGES,
                 False)  # fmt: skip
        if full:
            fold_int8(state, row_scale, ring_v, source, keys, P, rate, K, V, BK, BF, BR)
    elif full:
        _columns(state, None, ring_v, q, v, out, query, keys, past, near, source, depth, P, rate,
                 scale, q_token, v_token, T, H, K, V, BK, BF, BR, BT, STAGES, True)  # fmt: skip
    else:
        _columns(state, None, ring_v, q, v, out, query, keys, past, near, source, depth, P, rate,
                 scale, q_token, v_token, T, H, K, V, BK, BV, BR, BT, STAGES, False)  # fmt: skip
    base = tl.where(full, 0, P)
    moved = live & (source != i) & (base > 0)
    _write_rows(ring_k, k + b * k_row + h * k_head, k_token, source, moved, base, T, K, BK, BR, BT)
    _write_rows(ring_v, v, v_token, source, moved, base, T, V, WV, BR, BT)
    tl.store(count, base)


@triton.jit
def _write_rows(
    ring, x, x_token, source, moved, base, T,
    W: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Close the gaps that rejected tokens left in the ring, and put the draft behind."""
    i, t, iw = tl.arange(0, BR), tl.arange(0, BT), tl.arange(0, BW)
    in_w = (iw < W)[None, :]
    kept = tl.load(ring + source[:, None] * W + iw[None, :], mask=moved[:, None] & in_w)
    tl.debug_barrier()  # every row has been read before one is written
    tl.store(ring + i[:, None] * W + iw[None, :], kept, mask=moved[:, None] & in_w)
    inside = (t < T)[:, None] & in_w
    draft = tl.load(x + t[:, None] * x_token + iw[None, :], mask=inside)
    tl.store(ring + (base + t)[:, None] * W + iw[None, :], draft, mask=inside)


@triton.jit
def _commit_kernel(
    log_decay, state, ring_k, ring_v, count, row_scale, slots, accepted,
    state_slot, keys_slot, values_slot, count_slot, scale_slot, A, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """A program owns one head of one slot, its ring and its cursor: nobody else touches them."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    slot = tl.load(slots + b).to(tl.int64)
    if slot < 0:
        return
    rate, count = load_log_decay(log_decay, h), count + slot * count_slot + h
    state += slot * state_slot + h * K * V
    ring_k += slot * keys_slot + h * R * K
    ring_v += slot * values_slot + h * R * V
    source, P = _rows_to_keep(count, accepted, b, A, R, BR)
    ik, iv, live = tl.arange(0, BK)[:, None], tl.arange(0, BF)[None, :], tl.arange(0, BR) < P
    at_keys = ring_k + source[None, :] * K + ik
    keys = tl.load(at_keys, mask=(ik < K) & live[None, :], other=0.0)
    if row_scale is not None:
        row_scale += slot * scale_slot + h * K
        if P > 0:
            fold_int8(state, row_scale, ring_v, source, keys, P, rate, K, V, BK, BF, BR)
    else:
        weighted, decay = weigh(keys, P, rate, BR), power(rate, P.to(tl.float32))
        for start in range(0, V, BF):
            at = state + ik * V + start + iv
            inside = (ik < K) & (start + iv < V) & (P > 0)
            S = tl.load(at, mask=inside, other=0.0)
            at_values = ring_v + source[:, None] * V + start + iv
            values = tl.load(at_values, mask=live[:, None] & (start + iv < V), other=0.0)
            tl.store(at, fold(S, decay, weighted, values), mask=inside)
    tl.debug_barrier()  # the cursor has been read by all before it is written
    tl.store(count, 0)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
) -> Tensor:
    """Run a draft of every sequence; arguments and result as in the public operator.

    Args:
        pool: state, ring_k, ring_v and count of the ReplayPool; of an Int8ReplayPool codes in place
            of the state, and the scales behind them.
    """
    (B, T, H, K), V, R = q.shape, v.shape[-1], pool[1].shape[2]
    check_runnable(_verify_kernel, q, V)
    o = q.new_empty(B, T, H, V)
    q, k, v = (contiguous_widths(x) for x in (q, k, v))
    held, strides = pool_arguments(pool)
    kernel = "lightning_verify" if held[4] is None else "lightning_verify_int8"
    config = tuning(kernel, B * H, K, q.device)
    BK, WV = next_power_of_2(K), next_power_of_2(V)
    if o.numel():
        _verify_kernel[(B * H,)](
            q, k, v, log_decay, *held, slots,
            slots if accepted is None else accepted.contiguous(),
            slots if ancestors is None else ancestors.contiguous(),
            o, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *strides, T, 0 if accepted is None else accepted.shape[1], H,
            K=K, V=V, R=R, BK=BK, BV=min(config["BV"], WV), BF=min(config["BF"], WV), WV=WV,
            BR=max(16, next_power_of_2(R)), BT=DRAFT_ROWS, TREE=ancestors is not None,
            STAGES=config["num_stages"], num_warps=config["num_warps"],
        )  # fmt: skip
    return o


def commit(
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
) -> None:
    """Fold every accepted token into its state; arguments as in the public operator."""
    state, ring_k = pool[:2]
    H, K, V, R = *state.shape[1:], ring_k.shape[2]
    check_runnable(_commit_kernel, ring_k, V)
    config = tuning("lightning_commit", len(slots) * H, K, state.device)
    held, strides = pool_arguments(pool)
    if len(slots) * H:
        _commit_kernel[(len(slots) * H,)](
            log_decay, *held, slots,
            slots if accepted is None else accepted.contiguous(),
            *strides, 0 if accepted is None else accepted.shape[1],
            H, K=K, V=V, R=R, BK=next_power_of_2(K),
            BF=min(config["BF"], next_power_of_2(V)), BR=max(16, next_power_of_2(R)),
            num_warps=config["num_warps"],
        )  # fmt: skip
