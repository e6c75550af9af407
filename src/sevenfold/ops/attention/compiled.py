"""Causal softmax attention of one sequence, fp32 on a CPU, by numba.

Blocks of queries go over blocks of keys with a running maximum and sum (FlashAttention, arXiv
2205.14135), so that no score leaves the cache:

    S = Q K^T    m' = max(m, max_j S)    P = exp(S - m')    l' = l exp(m - m') + sum_j P
    O' = O exp(m - m') + P V             o = O / l at the end

The gradient (compiled_backward.py) computes P anew from m + ln l, which is kept for it.

Measured on 2 threads of an AMD EPYC with AVX-512, 8 heads of 32, 16,384 tokens: 0.53 s, where
scaled_dot_product_attention takes 0.94 (its products are MKL's).
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from math import log
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.attention import compiled_backward
from sevenfold.ops.compiled import compiled, empty, exp32, use_torch_threads
from sevenfold.ops.lanes import exp_of, max_of
from sevenfold.ops.tile import COLUMNS, ROWS, add_tile

_QUERIES, _KEYS = 32, 256  # a block of scores is 32 KB
_F = np.float32


def one_sequence(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """One sequence; arguments and result as in reference.one_sequence."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Attention.apply(q, k, v, scale, window)
    return _forward(q, k, v, scale, window)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        o, peaks = _forward(q, k, v, scale, window)
        ctx.save_for_backward(q, k, v, o, peaks)
        ctx.scale, ctx.window = scale, window
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = compiled_backward.backward(grads[0], *saved, scale=ctx.scale, window=ctx.window)
        return *found, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """o [T, H, V], and ln sum_j exp(scale q_i^T k_j) [T', H] of whole blocks of queries."""
    T, H, D = q.shape
    S, _, V = v.shape
    missing = -S % _KEYS
    queries = empty(-(-T // _QUERIES) * _QUERIES, H * D)
    torch.mul(q.detach(), scale, out=queries[:T].view(T, H, D))
    queries[T:] = 0
    # [G, S' / KEYS, D, KEYS]: a block in one place.
    keys = F.pad(k.detach(), (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, _KEYS))
    keys = keys.permute(2, 0, 3, 1).contiguous()
    values = F.pad(v.detach().transpose(0, 1), (0, 0, 0, missing)).contiguous()  # [G, S', V]
    o, peaks = empty(len(queries), H * V), empty(len(queries), H)
    use_torch_threads()
    arrays = (t.numpy() for t in (queries, keys, values, o, peaks))
    _attend(*arrays, H, S - T, S if window is None else window)
    return o[:T].view(T, H, V), peaks


@njit(inline="always")
def _score(s, q, q_at, q_row, k, k_at, D, columns):
    """s = Q K^T of a block of queries and `columns` keys."""
    for r in range(0, _QUERIES, ROWS):
        for n in range(0, columns, COLUMNS):
            at = r * _KEYS + n
            add_tile(s, at, _KEYS, q, q_at + r * q_row, q_row, 1, k, k_at + n, _KEYS, D, 0)


@njit(inline="always")
def _weigh(s, at, low, high, most, total):
    """A row of scores to its weights, zero outside of [low, high); the new maximum and sum."""
    for n in range(low):
        s[at + n] = -np.inf
    for n in range(high, _KEYS):
        s[at + n] = -np.inf
    top = max_of(s, at, _KEYS, most)
    added = exp_of(s, at, _KEYS, top)
    return top, total * exp32(most - top) + added


@compiled
def _attend(q, k, v, o, peaks, H, past, window):
    """o [T', H V] of q [T', H D], the tokens from `past`, over k in blocks and v [G, S', V]."""
    D, (G, S, V) = k.shape[2], v.shape
    q_row, o_row, num_blocks = H * D, H * V, len(q) // _QUERIES
    pairs = (num_blocks + 1) // 2  # an early block with a late one: equal work
    q, k, v, o = q.reshape(-1), k.reshape(-1), v.reshape(-1), o.reshape(-1)
    for unit in prange(H * pairs):
        h, g = unit // pairs, unit // pairs // (H // G)
        s = np.empty(_QUERIES * _KEYS, np.float32)
        most, total = np.empty(_QUERIES, np.float32), np.empty(_QUERIES, np.float32)
        early = unit % pairs
        for block in range(early, num_blocks - early, max(1, num_blocks - 1 - 2 * early)):
            first = block * _QUERIES
            q_at, o_at = first * q_row + h * D, first * o_row + h * V
            most[:], total[:] = -np.inf, 0
            begin = max(past + first - window + 1, 0) // _KEYS * _KEYS
            end = min(past + first + _QUERIES, S)
            for key in range(begin, end, _KEYS):
                columns = min(-(-(end - key) // COLUMNS) * COLUMNS, _KEYS)
                _score(s, q, q_at, q_row, k, (g * S + key) * D, D, columns)
                for r in range(_QUERIES):
                    last = past + first + r - key
                    low, high = max(last - window + 1, 0), min(last + 1, _KEYS)
                    row_at = o_at + r * o_row
                    if high <= low:
                        s[r * _KEYS : (r + 1) * _KEYS] = 0
                    else:
                        before = most[r]
                        most[r], total[r] = _weigh(s, r * _KEYS, low, high, before, total[r])
                        if before < most[r] and key > begin:
                            fade = exp32(before - most[r])
                            for d in range(V):
                                o[row_at + d] *= fade
                v_at, keep = (g * S + key) * V, int(key > begin)
                for r in range(0, _QUERIES, ROWS):
                    for d in range(0, V, COLUMNS):
                        at = o_at + r * o_row + d
                        add_tile(
                            o, at, o_row, s, r * _KEYS, _KEYS, 1, v, v_at + d, V, columns, keep
                        )
            for r in range(_QUERIES):
                peaks[first + r, h] = most[r] + _F(log(total[r]))
                for d in range(V):
                    o[o_at + r * o_row + d] /= total[r]
