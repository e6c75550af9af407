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

from math import exp
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, empty, even_parts, use_torch_threads
from sevenfold.ops.lightning.eager import keep_empty
from sevenfold.ops.tile import COLUMNS, ROWS, SIDE, add_tile, copy_columns, fetch, turn

_CHUNK = COLUMNS
_LINE = 16  # elements of a line of the cache
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
        H = len(log_decay)
        self.powers, self.within = torch.empty(H, _CHUNK + 1), torch.empty(H, _CHUNK, _CHUNK)
        _decays(log_decay.double().numpy(), self.powers.numpy(), self.within.numpy())
        self.reverse = reverse
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
            self.within.numpy(),
            self.borders,
            _F(scale),
            self.reverse,
            min(H, even_parts(len(final))),
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


@njit(cache=True)
def _decays(log_decay, powers, within):
    """powers [H, C + 1] of the decay, and M [H, C, C]."""
    for h in range(len(powers)):
        powers[h, 0] = 1  # an infinite decay over no distance too
        for i in range(1, powers.shape[1]):
            powers[h, i] = exp(log_decay[h] * i)
        for i in range(_CHUNK):
            for j in range(_CHUNK):
                within[h, i, j] = powers[h, i - j] if j <= i else _F(0)


@njit(inline="always")
def _ahead(x, at, step, count, D):
    """Ask for `count` tokens early: their rows are too far apart for the processor to foresee."""
    for i in range(count):
        for d in range(0, D, _LINE):
            fetch(x, at + i * step + d)


@njit(inline="always")
def _load(x, at, step, count, rows):
    """rows [C, D] = x_i of `count` tokens `step` elements apart, zeros after them."""
    D = rows.shape[1]
    for i in range(count):
        for d in range(0, D, COLUMNS):
            copy_columns(rows, i * D + d, x, at + i * step + d)
    for i in range(count, _CHUNK):
        for d in range(D):
            rows[i, d] = 0


@njit(inline="always")
def _load_queries(x, at, step, count, scale, power, rows, faded):
    """rows [C, D] = scale x_i as _load, and faded_i = decay^i rows_i."""
    D = rows.shape[1]
    for i in range(count):
        row = at + i * step
        for d in range(D):
            rows[i, d] = scale * x[row + d]
            faded[i, d] = power[i] * rows[i, d]
    for i in range(count, _CHUNK):
        for d in range(D):
            rows[i, d], faded[i, d] = 0, 0


@njit(inline="always")
def _turned(x, at, step, count, columns, spare):
    """columns [D, C] of `count` tokens, zeros after them; spare [C, D] is for what is no block."""
    D = len(columns)
    if count < _CHUNK:
        _load(x, at, step, count, spare)
        for d in range(0, D, SIDE):
            for i in range(0, _CHUNK, SIDE):
                turn(columns, d * _CHUNK + i, _CHUNK, spare, i * D + d, D)
    else:
        for i in range(0, _CHUNK, SIDE):
            for d in range(0, D, SIDE):
                turn(columns, d * _CHUNK + i, _CHUNK, x, at + i * step + d, step)


@njit(inline="always")
def _times(out, a, a_row, b, inner, keep):
    """out (+)= A B; the columns of out and B are neighbours."""
    N, D = out.shape
    for n in range(0, N, ROWS):
        for d in range(0, D, COLUMNS):
            add_tile(out, n * D + d, D, a, n * a_row, a_row, 1, b, d, D, inner, keep)


@compiled
def _scan(
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    o,
    final,
    powers,
    within,
    borders,
    scale,
    reverse,
    groups,
):
    """o [B, T, H, V]; final [N, H, K, V] holds what the first tokens meet, then the last states."""
    N, H, K, V = final.shape
    per_group = -(-H // groups)
    for unit in prange(N * groups):
        n, group = unit // groups, unit % groups
        begin, end = borders[n], borders[n + 1]
        queries, faded = np.empty((_CHUNK, K), np.float32), np.empty((_CHUNK, K), np.float32)
        keys, keys_t = np.empty((_CHUNK, K), np.float32), np.empty((K, _CHUNK), np.float32)
        values, oc = np.empty((_CHUNK, V), np.float32), np.empty((_CHUNK, V), np.float32)
        scores, to_end = np.empty((_CHUNK, _CHUNK), np.float32), np.empty(_CHUNK, np.float32)
        # The heads of a chunk in turn: a token's row is read from its beginning to its end.
        for start in range(0, end - begin, _CHUNK):
            count = min(_CHUNK, end - begin - start)
            first, step = (end - 1 - start, -1) if reverse else (begin + start, 1)
            for h in range(group * per_group, min((group + 1) * per_group, H)):
                state, power = final[n, h], powers[h]
                q_at, k_at = first * q_row + h * q_head, first * k_row + h * k_head
                v_at, next_chunk = first * v_row + h * v_head, _CHUNK * step
                _ahead(q, q_at + next_chunk * q_row, step * q_row, count, K)
                _ahead(k, k_at + next_chunk * k_row, step * k_row, count, K)
                _ahead(v, v_at + next_chunk * v_row, step * v_row, count, V)
                _load_queries(q, q_at, step * q_row, count, scale, power, queries, faded)
                _turned(k, k_at, step * k_row, count, keys_t, keys)
                _load(v, v_at, step * v_row, count, values)
                _times(scores, queries, K, keys_t, K, 0)
                for i in range(_CHUNK):
                    for j in range(_CHUNK):
                        scores[i, j] = scores[i, j] * within[h, i, j] if j <= i else _F(0)
                _times(oc, faded, K, state, K, 0)
                _times(oc, scores, _CHUNK, values, _CHUNK, 1)
                for i in range(count):
                    for d in range(0, V, COLUMNS):
                        copy_columns(o, ((first + step * i) * H + h) * V + d, oc, i * V + d)
                reach = count - 1 if start + _CHUNK >= end - begin else _CHUNK
                for i in range(_CHUNK):
                    to_end[i] = power[reach - i] if i < count else _F(0)
                for d in range(K):
                    for i in range(_CHUNK):
                        keys_t[d, i] *= to_end[i]
                    for e in range(V):
                        state[d, e] *= power[reach]
                _times(state, keys_t, _CHUNK, values, _CHUNK, 1)
