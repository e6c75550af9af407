"""The norms in one pass each way, fp32 on a CPU, by numba.

Rows are taken in blocks of a fixed size, and the weight's gradient is the sum of the blocks' sums:
the same bits with any number of threads.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

from math import sqrt
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, dot32, exp32, lent, use_torch_threads

_F = np.float32
_BLOCK_ROWS = 64


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm; arguments and result as in the public operator."""
    return _Norm.apply(x, None, weight, eps)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm times sigmoid(gate); arguments and result as in the public operator."""
    return _Norm.apply(x, gate, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        rows, weight = _rows(x), weight.detach().contiguous()
        ctx.save_for_backward(rows, None if gate is None else _rows(gate), weight)
        ctx.eps, ctx.shape = eps, x.shape
        y = torch.empty_like(rows)
        use_torch_threads()
        if gate is None:
            _forward(rows.numpy(), lent(weight), _F(eps), y.numpy())
        else:
            arrays = (rows.numpy(), _rows(gate).numpy(), lent(weight))
            _gated_forward(*arrays, _F(eps), y.numpy())
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        rows, gate, weight = ctx.saved_tensors
        dy, dx = _rows(grads[0]), torch.empty_like(rows)
        parts = rows.new_zeros(-(-len(rows) // _BLOCK_ROWS), rows.shape[1])
        use_torch_threads()
        if gate is None:
            inputs = (rows, weight, dy)
            _backward(*(lent(t) for t in inputs), _F(ctx.eps), dx.numpy(), parts.numpy())
            return dx.view(ctx.shape), None, parts.sum(0), None
        dgate = torch.empty_like(gate)
        inputs, outputs = (rows, gate, weight, dy), (dx, dgate, parts)
        arrays = (lent(t) for t in inputs)
        _gated_backward(*arrays, _F(ctx.eps), *(t.numpy() for t in outputs))
        return dx.view(ctx.shape), dgate.view(ctx.shape), parts.sum(0), None


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


@njit(inline="always")
def _root(x, eps):
    return _F(1 / sqrt(dot32(x, x) / len(x) + eps))


@compiled
def _forward(x, weight, eps, y):
    for n in prange(len(x)):
        r = _root(x[n], eps)
        for d in range(x.shape[1]):
            y[n, d] = x[n, d] * r * weight[d]


@compiled
def _gated_forward(x, gate, weight, eps, y):
    for n in prange(len(x)):
        r = _root(x[n], eps)
        for d in range(x.shape[1]):
            y[n, d] = x[n, d] * r * weight[d] / (_F(1) + exp32(-gate[n, d]))


@compiled
def _backward(x, weight, dy, eps, dx, parts):
    D = x.shape[1]
    for block in prange(len(parts)):
        part, scaled = parts[block], np.empty(D, np.float32)
        for n in range(block * _BLOCK_ROWS, min(len(x), (block + 1) * _BLOCK_ROWS)):
            r = _root(x[n], eps)
            for d in range(D):
                part[d] += dy[n, d] * x[n, d] * r
                scaled[d] = dy[n, d] * weight[d]
            shared = dot32(scaled, x[n]) * r * r / _F(D)
            for d in range(D):
                dx[n, d] = r * (scaled[d] - shared * x[n, d])


@compiled
def _gated_backward(x, gate, weight, dy, eps, dx, dgate, parts):
    D = x.shape[1]
    for block in prange(len(parts)):
        part, scaled = parts[block], np.empty(D, np.float32)
        for n in range(block * _BLOCK_ROWS, min(len(x), (block + 1) * _BLOCK_ROWS)):
            r = _root(x[n], eps)
            for d in range(D):
                s = _F(1) / (_F(1) + exp32(-gate[n, d]))
                normed = x[n, d] * r * dy[n, d]
                part[d] += normed * s
                dgate[n, d] = normed * weight[d] * s * (_F(1) - s)
                scaled[d] = dy[n, d] * weight[d] * s
            shared = dot32(scaled, x[n]) * r * r / _F(D)
            for d in range(D):
                dx[n, d] = r * (scaled[d] - shared * x[n, d])
