"""Verification and commit by loops that numba compiles, fp32 on a CPU: a head of a row at a time.

The formulas are those of verify.py. In plain PyTorch a draft takes some fifty small operators a
layer, which cost more than what they compute.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from math import exp

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, dot32, use_torch_threads

_F = np.float32


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
    """Run a draft of every sequence; arguments and result as in the public operator."""
    B, T = q.shape[:2]
    # Of another layout it would be compiled once more, for seconds.
    tree = None if ancestors is None else ancestors.contiguous().numpy()
    sees = np.tri(T, dtype=np.bool_)[None] if tree is None else tree
    o = torch.empty(v.shape)
    use_torch_threads()
    tokens = [x.detach().contiguous().numpy() for x in (q, k, v)]
    held = [x.numpy() for x in pool]
    _verify(
        *tokens, log_decay.numpy(), *held, *_rows(slots, accepted, B), sees, _F(scale), o.numpy()
    )
    return o


def commit(
    log_decay: Tensor, pool: Sequence[Tensor], slots: Tensor, accepted: Tensor | None
) -> None:
    """Fold every accepted token into its state; arguments as in the public operator."""
    use_torch_threads()
    held = [x.numpy() for x in pool]
    _commit(log_decay.numpy(), *held, *_rows(slots, accepted, len(slots)))


def _rows(slots: Tensor, accepted: Tensor | None, B: int) -> tuple[np.ndarray, np.ndarray]:
    taken = np.empty((B, 0), np.int32) if accepted is None else accepted.contiguous().numpy()
    return slots.long().contiguous().numpy(), taken


@njit(inline="always")
def _power(log_decay, distance):
    """decay^distance; 1 over no distance, whatever the decay."""
    return _F(exp(log_decay * distance)) if distance > 0 else _F(1)


@njit(inline="always")
def _accept(ring_k, ring_v, held, accepted):
    """Put accepted tokens of the last draft behind the `held` first of a ring; how many there are.

    They rise, so that none is overwritten before it has moved.
    """
    pending = held
    for index in accepted:
        if index >= 0:
            ring_k[pending], ring_v[pending] = ring_k[held + index], ring_v[held + index]
            pending += 1
    return pending


@njit(inline="always")
def _fold(state, ring_k, ring_v, pending, log_decay):
    """state = decay^P state + sum_i decay^(P - 1 - i) k_i v_i^T."""
    K, V = state.shape
    faded = _power(log_decay, pending)
    for d in range(K):
        for e in range(V):
            state[d, e] *= faded
    for i in range(pending):
        left = _power(log_decay, pending - 1 - i)
        for d in range(K):
            x = left * ring_k[i, d]
            for e in range(V):
                state[d, e] += x * ring_v[i, e]


@compiled
def _verify(q, k, v, log_decay, state, ring_k, ring_v, count, slots, accepted, sees, scale, o):
    """o [B, T, H, V] of drafts q, k, v, which go into the rings; sees [1 or B, T, T]."""
    B, T, H, _ = q.shape
    V, R = v.shape[3], ring_k.shape[2]
    for unit in prange(B * H):
        b, h = unit // H, unit % H
        slot = slots[b]
        if slot < 0:
            o[b, :, h] = _F(0)
            continue
        keys, values, rate = ring_k[slot, h], ring_v[slot, h], log_decay[h]
        pending = _accept(keys, values, count[slot, h], accepted[b])
        seen, depth = sees[b % len(sees)], np.empty(T, np.int64)
        sums = np.empty(V, np.float32)
        for t in range(T):
            depth[t] = -1
            for s in range(T):
                depth[t] += seen[t, s]
        for t in range(T):
            query = q[b, t, h]
            sums[:] = _F(0)
            for d in range(len(query)):
                for e in range(V):
                    sums[e] += query[d] * state[slot, h, d, e]
            faded = _power(rate, pending + depth[t] + 1)
            for e in range(V):
                sums[e] *= faded
            for i in range(pending):
                weight = dot32(query, keys[i]) * _power(rate, pending + depth[t] - i)
                for e in range(V):
                    sums[e] += weight * values[i, e]
            for s in range(T):
                if seen[t, s]:
                    weight = dot32(query, k[b, s, h]) * _power(rate, depth[t] - depth[s])
                    for e in range(V):
                        sums[e] += weight * v[b, s, h, e]
            for e in range(V):
                o[b, t, h, e] = scale * sums[e]
        if pending + T > R:
            _fold(state[slot, h], keys, values, pending, rate)
            pending = 0
        for t in range(T):
            keys[pending + t], values[pending + t] = k[b, t, h], v[b, t, h]
        count[slot, h] = pending


@compiled
def _commit(log_decay, state, ring_k, ring_v, count, slots, accepted):
    """Fold what is pending, and what is accepted, into the states."""
    H = len(log_decay)
    for unit in prange(len(slots) * H):
        b, h = unit // H, unit % H
        slot = slots[b]
        if slot >= 0:
            keys, values = ring_k[slot, h], ring_v[slot, h]
            pending = _accept(keys, values, count[slot, h], accepted[b])
            _fold(state[slot, h], keys, values, pending, log_decay[h])
            count[slot, h] = 0
