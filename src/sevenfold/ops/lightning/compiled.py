"""Lightning attention by chunks of 32 tokens that stay in a core's cache; fp32 on a CPU, by numba.

With P what row 0 of a chunk of C tokens meets, M_ij = decay^(i - j) for i >= j and 0 else:

    O  = ((Q K^T) * M) V + diag(decay^i) Q P
    P' = decay^C P + (diag(decay^(C - j)) K)^T V      the next chunk's
    S  = P' / decay                                   after the last token

The formulas are those of eager.py, and so is the backward: three more scans. A sequence's head is
one unit of work, whose sums have one order.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, empty, use_torch_threads
from sevenfold.ops.lightning.eager import keep_empty
from sevenfold.ops.tile import COLUMNS, ROWS, add_tile

_CHUNK = COLUMNS
_F = np.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    lengths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Run every sequence; arguments and result as in reference.forward."""
    return _LightningAttention.apply(q, k, v, log_decay, scale, initial_state, lengths)


class _LightningAttention(torch.autograd.Function):
    """Saves q, k and v only, and scans as eager.py does."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        scale: float,
        initial_state: Tensor | None,
        lengths: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, log_decay, initial_state)
        ctx.scale, ctx.lengths = scale, lengths
        scan = _Scan(log_decay, lengths)
        met = None if initial_state is None else scan.decayed(initial_state)
        o, final = scan(q, k, v, met, scale=scale)
        return o, keep_empty(final, initial_state, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do, dfinal = grads
        q, k, v, log_decay, initial_state = ctx.saved_tensors
        do = do if ctx.scale == 1.0 else do * ctx.scale
        scan = _Scan(log_decay, ctx.lengths)
        met = None if initial_state is None else scan.decayed(initial_state).mT
        dq, _ = scan(do, v, k, met)
        back = _Scan(log_decay, ctx.lengths, reverse=True)
        dv, first = back(k, q, do, dfinal)
        dk, _ = back(v, do, q, dfinal.mT)
        if initial_state is None:
            return dq, dk, dv, None, None, None, None
        return dq, dk, dv, None, None, keep_empty(back.decayed(first), dfinal, ctx.lengths), None


class _Scan:
    """The recurrence over all sequences, in one direction of time."""

    def __init__(
        self, log_decay: Tensor, lengths: tuple[int, ...], *, reverse: bool = False
    ) -> None:
        tokens = torch.arange(_CHUNK + 1, dtype=torch.float64)
        powers = torch.exp(log_decay.double()[:, None] * tokens).float()
        powers[:, 0] = 1  # an infinite decay over no distance too
        self.powers, self.reverse = powers, reverse
        self.borders = np.cumsum([0, *lengths], dtype=np.int64)

    def decayed(self, state: Tensor) -> Tensor:
        """The state one token later."""
        return self.powers[:, 1, None, None] * state

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, met: Tensor | None, *, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The outputs, like v, and the last states; met [N, H, K, V] is the first P."""
        (B, T, H, K), V = q.shape, v.shape[-1]
        o, final = empty(B, T, H, V), torch.zeros(len(self.borders) - 1, H, K, V)
        if met is not None:
            final.copy_(met)
        use_torch_threads()
        tokens = [part for x in (q, k, v) for part in _flat(x)]
        _scan(
            *tokens,
            o.numpy(),
            final.numpy(),
            self.powers.numpy(),
            self.borders,
            _F(scale),
            self.reverse,
        )
        return o, final


def _flat(x: Tensor) -> tuple[np.ndarray, int, int]:
    """x [B, T, H, D] as one array over its memory, and what lies between tokens and heads."""
    x = x.detach()
    tokens = (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1)
    row, head, _ = tokens.stride()
    span = 1 + sum(
        (size - 1) * step for size, step in zip(tokens.shape, tokens.stride(), strict=True)
    )
    return tokens.as_strided((span if tokens.numel() else 0,), (1,)).numpy(), row, head


@njit(inline="always")
def _load(x, at, step, count, scale, rows):
    """rows [C, D] = scale x_i of `count` tokens `step` elements apart, zeros after them."""
    D = rows.shape[1]
    for i in range(count):
        token, row = x[at + i * step : at + i * step + D], rows[i]
        for d in range(D):
            row[d] = scale * token[d]
    rows[count:] = 0


@njit(inline="always")
def _decay_within(power, within):
    """M [C, C]."""
    for i in range(_CHUNK):
        for j in range(_CHUNK):
            within[i, j] = power[i - j] if j <= i else _F(0)


@njit(inline="always")
def _times(out, a, a_row, b, inner, keep):
    """out (+)= A B; the columns of out and B are neighbours."""
    N, D = out.shape
    for n in range(0, N, ROWS):
        for d in range(0, D, COLUMNS):
            add_tile(out, n * D + d, D, a, n * a_row, a_row, 1, b, d, D, inner, keep)


@compiled
def _scan(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, o, final, powers, borders, scale, reverse
):
    """o [B, T, H, V]; final [N, H, K, V] holds what the first tokens meet, then the last states."""
    (N, H, K, V), o = final.shape, o.reshape(-1, o.shape[2], o.shape[3])
    for unit in prange(N * H):
        n, h = unit // H, unit % H
        begin, end, power = borders[n], borders[n + 1], powers[h]
        state = final[n, h]
        queries, faded = np.empty((_CHUNK, K), np.float32), np.empty((_CHUNK, K), np.float32)
        keys, keys_t = np.empty((_CHUNK, K), np.float32), np.empty((K, _CHUNK), np.float32)
        values, oc = np.empty((_CHUNK, V), np.float32), np.empty((_CHUNK, V), np.float32)
        scores, within = np.empty((2, _CHUNK, _CHUNK), np.float32)
        to_end = np.empty(_CHUNK, np.float32)
        _decay_within(power, within)
        for start in range(0, end - begin, _CHUNK):
            count = min(_CHUNK, end - begin - start)
            first, step = (end - 1 - start, -1) if reverse else (begin + start, 1)
            _load(q, first * q_row + h * q_head, step * q_row, count, scale, queries)
            _load(k, first * k_row + h * k_head, step * k_row, count, _F(1), keys)
            _load(v, first * v_row + h * v_head, step * v_row, count, _F(1), values)
            for i in range(_CHUNK):
                for d in range(K):
                    faded[i, d] = power[i] * queries[i, d]
            for d in range(K):
                for i in range(_CHUNK):
                    keys_t[d, i] = keys[i, d]
            _times(scores, queries, K, keys_t, K, 0)
            for i in range(_CHUNK):
                for j in range(_CHUNK):
                    scores[i, j] = scores[i, j] * within[i, j] if j <= i else _F(0)
            _times(oc, faded, K, state, K, 0)
            _times(oc, scores, _CHUNK, values, _CHUNK, 1)
            for i in range(count):
                o[first + step * i, h] = oc[i]
            reach = count - 1 if start + _CHUNK >= end - begin else _CHUNK
            for i in range(_CHUNK):
                to_end[i] = power[reach - i] if i < count else _F(0)
            for d in range(K):
                for i in range(_CHUNK):
                    keys_t[d, i] *= to_end[i]
                for e in range(V):
                    state[d, e] *= power[reach]
            _times(state, keys_t, _CHUNK, values, _CHUNK, 1)
