"""The gradient of causal softmax attention of one sequence, fp32 on a CPU, by numba.

With P = exp(S - peak) of a block of queries and a block of keys, and delta_i = do_i^T o_i:

    dV += P^T dO    dS = P * (dO V^T - delta)    dQ += dS K    dK += dS^T Q

A head is one unit of work, whose sums have one order (FlashAttention, arXiv 2205.14135).
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.compiled import compiled, dot32, exp32, use_torch_threads
from sevenfold.ops.tile import COLUMNS, ROWS, add_tile

_BLOCK = 64  # of queries and of keys: two blocks of scores are 32 KB
_F = np.float32


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    peaks: Tensor,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of q, do, o [T, H, D or V], k, v [S, G, D or V]; peaks [T or more, H]."""
    (T, H, _), (S, G, _) = q.shape, k.shape
    queries, outputs, gradients = (_heads(x) for x in (q.detach() * scale, o, do))
    keys, values = _heads(k), _heads(v)
    dq, dk, dv = (torch.zeros(H, *x.shape[1:]) for x in (queries, keys, values))
    use_torch_threads()
    inputs = (queries, keys, keys.mT.contiguous(), values.mT.contiguous(), outputs, gradients)
    arrays = (t.numpy() for t in (*inputs, _heads(peaks[:T, :, None])[..., 0], dq, dk, dv))
    _backward(*arrays, S - T, S if window is None else window)
    dk, dv = (x.view(G, H // G, *x.shape[1:]).sum(1)[:, :S].transpose(0, 1) for x in (dk, dv))
    return dq[:, :T].transpose(0, 1) * scale, dk, dv


def _heads(x: Tensor) -> Tensor:
    """x [T, H, D] as [H, T', D] of whole blocks, zeros after the last token."""
    return F.pad(x.detach().transpose(0, 1), (0, 0, 0, -len(x) % _BLOCK)).contiguous()


@njit(inline="always")
def _scores(s, a, a_at, D, b, b_at, columns):
    """s = A B of a block of rows [BLOCK, D] and a block of columns."""
    for r in range(0, _BLOCK, ROWS):
        for n in range(0, _BLOCK, COLUMNS):
            left = (a, a_at + r * D, D, 1)
            add_tile(s, r * _BLOCK + n, _BLOCK, *left, b, b_at + n, columns, D, 0)


@njit(inline="always")
def _add(c, c_at, D, s, row, column, b, b_at):
    """C += S B, or S^T B, of blocks of rows [BLOCK, D] that lie one after another."""
    for r in range(0, _BLOCK, ROWS):
        for d in range(0, D, COLUMNS):
            left = (s, r * row, row, column)
            add_tile(c, c_at + r * D + d, D, *left, b, b_at + d, D, _BLOCK, 1)


@compiled
def _backward(q, k, k_t, v_t, o, do, peaks, dq, dk, dv, past, window):
    """dq of each head [H, T', D]; dk and dv [H, S', D or V] of each head of queries too."""
    (H, T, D), (G, S, _), V = q.shape, k.shape, o.shape[2]
    for h in prange(H):
        g = h // (H // G)
        p, ds = np.empty(_BLOCK * _BLOCK, np.float32), np.empty(_BLOCK * _BLOCK, np.float32)
        delta = np.empty(T, np.float32)
        for i in range(T):
            delta[i] = dot32(do[h, i], o[h, i])
        for key in range(0, S, _BLOCK):
            begin = max(key - past, 0) // _BLOCK * _BLOCK
            end = min(T, key + _BLOCK - 1 + window - past)
            k_at, v_at = (h * S + key) * D, (h * S + key) * V
            for first in range(begin, end, _BLOCK):
                q_at, o_at = (h * T + first) * D, (h * T + first) * V
                _scores(p, q, q_at, D, k_t, g * D * S + key, S)
                _scores(ds, do, o_at, V, v_t, g * V * S + key, S)
                for r in range(_BLOCK):
                    last = past + first + r - key
                    low, high = max(last - window + 1, 0), min(last + 1, _BLOCK)
                    peak, shared, at = peaks[h, first + r], delta[first + r], r * _BLOCK
                    for n in range(_BLOCK):
                        seen = low <= n < high
                        p[at + n] = exp32(p[at + n] - peak) if seen else _F(0)
                        ds[at + n] = p[at + n] * (ds[at + n] - shared) if seen else _F(0)
                _add(dv, v_at, V, p, 1, _BLOCK, do, o_at)
                _add(dk, k_at, D, ds, 1, _BLOCK, q, q_at)
                _add(dq, q_at, D, ds, _BLOCK, 1, k, (g * S + key) * D)
