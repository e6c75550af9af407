"""The loops, compiled by numba at first use and kept on disk; each weight is read once.

Every public function writes its last argument. Sums run in the dtype of the arrays or above.
"""
# pyright: basic, reportIndexIssue=false, reportCallIssue=false
# What numba compiles carries no annotations: its types are those of the arrays at the call.

from math import exp, sqrt

import numpy as np
from numba import njit, prange

from sevenfold.ops.compiled import FASTMATH
from sevenfold.ops.tile import fetch

_LINE = 16  # elements of a line of the cache
_AHEAD = 1024  # elements: a page, at whose end a processor's own foresight stops


@njit(inline="always")
def _ask(weight, at, count):
    """Ask for what will be read after `count` elements of a weight from `at` are read."""
    for i in range(at + _AHEAD, at + _AHEAD + count, _LINE):
        fetch(weight, i)


@njit(fastmath=FASTMATH, cache=True)
def _dot(a, b):
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total += a[i] * b[i]
    return total


@njit(fastmath=FASTMATH, cache=True)
def _sigmoid(x):
    return 1 / (1 + exp(-x))


@njit(fastmath=FASTMATH, cache=True)
def _rms_norm(x, norm):
    weight, eps = norm
    y = np.empty_like(x)
    for n in range(len(x)):
        root = 1 / sqrt(_dot(x[n], x[n]) / x.shape[1] + eps)
        for i in range(x.shape[1]):
            y[n, i] = x[n, i] * root * weight[i]
    return y


@njit(fastmath=FASTMATH, cache=True)
def lightning(x, norm, weights, residual, state, after, y):
    """Lightning attention; x, y [N, D], state and after [N, H, K, V], which may be one array."""
    qkv_weight, gate_weight, out_weight, norm_weight, eps, decay = weights
    alpha, beta, post_norm = residual
    N, H, K, V = state.shape
    u = _rms_norm(x, norm)
    qkv = np.empty((N, H, 2 * K + V), x.dtype)
    gate, o = np.empty((N, H * V), x.dtype), np.empty((N, H * V), x.dtype)
    _project(u, qkv_weight, gate_weight, qkv.reshape(N, -1), gate)
    _recur(qkv, decay, state, after, o)
    o = _rms_norm(o, (norm_weight, eps)) * gate
    _project_back(o, out_weight, u if post_norm else x, alpha, beta, y)


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def _project(u, qkv_weight, gate_weight, qkv, gate):
    num_qkv, D = qkv_weight.shape
    for m in prange(num_qkv + len(gate_weight)):
        if m < num_qkv:
            _ask(qkv_weight, m * D, D)
        else:
            _ask(gate_weight, (m - num_qkv) * D, D)
        for n in range(len(u)):
            if m < num_qkv:
                a = _dot(qkv_weight[m], u[n])
                qkv[n, m] = a * _sigmoid(a)
            else:
                gate[n, m - num_qkv] = _sigmoid(_dot(gate_weight[m - num_qkv], u[n]))


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def _recur(qkv, decay, state, after, o):
    N, H, K, V = state.shape
    for nh in prange(N * H):
        n, h = nh // H, nh % H
        q, k, v = qkv[n, h, :K], qkv[n, h, K : 2 * K], qkv[n, h, 2 * K :]
        row = o[n, h * V : (h + 1) * V]
        row[:] = 0
        for i in range(K):
            for j in range(V):
                s = decay[h] * state[n, h, i, j] + k[i] * v[j]
                after[n, h, i, j] = s
                row[j] += q[i] * s


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def _project_back(o, weight, stream, alpha, beta, y):
    K = weight.shape[1]
    for m in prange(len(weight)):
        _ask(weight, m * K, K)
        for n in range(len(o)):
            y[n, m] = alpha * stream[n, m] + beta * _dot(weight[m], o[n])


@njit(fastmath=FASTMATH, cache=True)
def experts(x, norm, weights, num_chosen, residual, y):
    """A mixture of experts; x, y [N, D]."""
    router, gate_up, down = weights
    u = _rms_norm(x, norm)
    chosen = np.empty((len(x), num_chosen), np.int64)
    shares = np.empty((len(x), num_chosen), x.dtype)
    _route(u, router, chosen, shares)
    _feed(x, u, gate_up, down, chosen, shares, residual, y)


@njit(fastmath=FASTMATH, cache=True)
def dense(x, norm, weights, residual, y):
    """A dense feed-forward, as the only expert; x, y [N, D]."""
    gate_up, down = weights
    shape = (len(x), 1)
    chosen, shares = np.zeros(shape, np.int64), np.ones(shape, x.dtype)
    _feed(x, _rms_norm(x, norm), gate_up, down, chosen, shares, residual, y)


@njit(fastmath=FASTMATH, cache=True)
def _feed(x, u, gate_up, down, chosen, shares, residual, y):
    alpha, beta, post_norm = residual
    hidden = np.empty((*chosen.shape, down.shape[2]), x.dtype)
    _feed_in(u, gate_up, chosen, hidden)
    _feed_out(hidden, down, chosen, shares, u if post_norm else x, alpha, beta, y)


@njit(fastmath=FASTMATH, cache=True)
def _route(u, router, chosen, shares):
    for n in range(len(u)):
        logits = np.empty(len(router), u.dtype)
        for e in range(len(router)):
            logits[e] = _dot(router[e], u[n])
        top = logits.max()
        total = 0.0
        for j in range(chosen.shape[1]):
            best = logits.argmax()
            share = exp(logits[best] - top)
            chosen[n, j], shares[n, j] = best, share
            total += share
            logits[best] = -np.inf
        shares[n] /= total


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def _feed_in(u, gate_up, chosen, hidden):
    (N, k, F), D = hidden.shape, gate_up.shape[2]
    for jf in prange(k * F):
        j, f = jf // F, jf % F
        for n in range(N):
            gate = (chosen[n, j] * 2 * F + f) * D
            _ask(gate_up, gate, D)
            _ask(gate_up, gate + F * D, D)
            weight = gate_up[chosen[n, j]]
            a = _dot(weight[f], u[n])
            hidden[n, j, f] = a * _sigmoid(a) * _dot(weight[F + f], u[n])


@njit(parallel=True, fastmath=FASTMATH, cache=True)
def _feed_out(hidden, down, chosen, shares, stream, alpha, beta, y):
    (N, k, F), D = hidden.shape, y.shape[1]
    for d in prange(D):
        for n in range(N):
            fed = 0.0
            for j in range(k):
                _ask(down, (chosen[n, j] * D + d) * F, F)
                fed += shares[n, j] * _dot(down[chosen[n, j], d], hidden[n, j])
            y[n, d] = alpha * stream[n, d] + beta * fed
