"""One token a sequence with recent keys and values beside the state: the Triton form."""

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


@triton.jit
def _columns(
    state, ring_v, v, out, query, keys, seen, own, P, rate, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """The output, BV columns at a time; with FOLD the state's also become those P tokens later.

    A fold reads the state once too, and needs more registers for a column than its absence does.
    """
    ik, iv, rows = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR)
    met, decay = power(rate, (P + 1).to(tl.float32)), power(rate, P.to(tl.float32))
    if FOLD:
        weighted = weigh(keys, P, rate, BR)
    for start in range(0, V, BV):
        in_v = start + iv < V
        at = state + ik[:, None] * V + start + iv[None, :]
        inside = (ik < K)[:, None] & in_v[None, :]
        S = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at_values = ring_v + rows[:, None] * V + start + iv[None, :]
        values = tl.load(at_values, mask=(rows < P)[:, None] & in_v[None, :], other=0.0)
        value = tl.load(v + start + iv, mask=in_v, other=0.0)
        got = met * tl.sum(query[:, None] * S, axis=0) + own * value.to(tl.float32)
        got = scale * (got + tl.sum(seen[:, None] * values.to(tl.float32), axis=0))
        tl.store(out + start + iv, got.to(out.dtype.element_ty), mask=in_v)
        if FOLD:
            tl.store(at, fold(S, decay, weighted, values), mask=inside)


@triton.jit
def _replay_kernel(
    q, k, v, log_decay, state, ring_k, ring_v, count, row_scale, slots, o, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, state_slot, keys_slot, values_slot, count_slot,
    scale_slot, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A program owns one head of one slot, its ring and its cursor: nobody else touches them.

    A state in int8 has a scale for each row, row_scale; None says that it is fp32.
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    slot = tl.load(slots + b).to(tl.int64)
    ik, iv, rows = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR)
    in_k, out = ik < K, o + tl.program_id(0).to(tl.int64) * V
    if slot < 0:
        for start in range(0, V, BV):
            nothing = tl.zeros([BV], o.dtype.element_ty)
            tl.store(out + start + iv, nothing, mask=start + iv < V)
        return
    count += slot * count_slot + h
    P = tl.load(count)
    rate = load_log_decay(log_decay, h)
    live, full = rows < P, P >= R
    state += slot * state_slot + h * K * V
    ring_k += slot * keys_slot + h * R * K
    ring_v += slot * values_slot + h * R * V
    query = tl.load(q + b * q_row + h * q_head + ik, mask=in_k, other=0.0).to(tl.float32)
    key = tl.load(k + b * k_row + h * k_head + ik, mask=in_k, other=0.0)
    inside = in_k[:, None] & live[None, :]
    keys = tl.load(ring_k + rows[None, :] * K + ik[:, None], mask=inside, other=0.0)
    seen = tl.sum(query[:, None] * keys.to(tl.float32), axis=0)
    seen = tl.where(live, power(rate, tl.where(live, P - rows, 0).to(tl.float32)), 0.0) * seen
    own = tl.sum(query * key.to(tl.float32))
    v += b * v_row + h * v_head
    if row_scale is not None:
        row_scale += slot * scale_slot + h * K
        query *= tl.load(row_scale + ik, mask=in_k, other=0.0)
        _columns(state, ring_v, v, out, query, keys, seen, own, P, rate, scale,
                 K, V, BK, BV, BR, False)  # fmt: skip
        if full:
            fold_int8(state, row_scale, ring_v, rows, keys, P, rate, K, V, BK, BF, BR)
    elif full:
        _columns(state, ring_v, v, out, query, keys, seen, own, P, rate, scale,
                 K, V, BK, BF, BR, True)  # fmt: skip
    else:
        _columns(state, ring_v, v, out, query, keys, seen, own, P, rate, scale,
                 K, V, BK, BV, BR, False)  # fmt: skip
    tl.debug_barrier()  # every row has been read before one is written
    row = tl.where(full, 0, P)
    tl.store(ring_k + row * K + ik, key, mask=in_k)
    for start in range(0, V, BV):
        in_v = start + iv < V
        value = tl.load(v + start + iv, mask=in_v, other=0.0)
        tl.store(ring_v + row * V + start + iv, value, mask=in_v)
    tl.store(count, row + 1)


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    scale: float,
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator.

    Args:
        pool: state, ring_k, ring_v and count of the ReplayPool; of an Int8ReplayPool codes in place
            of the state, and the scales behind them.
    """
    (B, H, K), V, R = q.shape, v.shape[-1], pool[1].shape[2]
    check_runnable(_replay_kernel, q, V)
    o = q.new_empty(B, H, V)
    q, k, v = (contiguous_widths(x) for x in (q, k, v))
    held, strides = pool_arguments(pool)
    kernel = "lightning_replay" if held[4] is None else "lightning_replay_int8"
    config = tuning(kernel, B * H, K, q.device)
    if o.numel():
        _replay_kernel[(B * H,)](
            q, k, v, log_decay, *held, slots, o, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *strides,
            H, K=K, V=V, R=R, BK=next_power_of_2(K),
            BV=min(config["BV"], next_power_of_2(V)),
            BF=min(config["BF"], next_power_of_2(V)), BR=max(16, next_power_of_2(R)),
            num_warps=config["num_warps"],
            num_stages=1,  # a pipelined fold takes registers that every other step would lack
        )  # fmt: skip
    return o
