"""SiLU of the projection in one pass each way, fp32 on a CPU, by numba."""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sevenfold.ops.compiled import compiled, empty, exp32, use_torch_threads

_F = np.float32


def silu_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, views of one tensor; arguments and results as in the public operator."""
    return _SiLU.apply(qkv, num_heads)


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        rows = qkv.detach().reshape(-1, qkv.shape[-1]).contiguous()
        ctx.save_for_backward(rows)
        ctx.shape = qkv.shape
        y = empty(*rows.shape)
        use_torch_threads()
        _forward(rows.numpy(), y.numpy())
        heads = y.view(*qkv.shape[:-1], num_heads, -1)
        D = heads.shape[-1] // 3
        # Views made outside of autograd's sight: each is an output of its own.
        return tuple(heads[..., i * D : (i + 1) * D] for i in range(3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        dqkv = empty(*rows.shape)
        dq, dk, dv = (g.reshape(len(rows), *g.shape[-2:]).contiguous() for g in grads)
        use_torch_threads()
        _backward(rows.numpy(), *(g.numpy() for g in (dq, dk, dv)), dqkv.numpy())
        return dqkv.view(ctx.shape), None


@compiled
def _forward(x, y):
    for n in prange(len(x)):
        for d in range(x.shape[1]):
            y[n, d] = x[n, d] / (_F(1) + exp32(-x[n, d]))


@njit(inline="always")
def _silu_grad(x):
    s = _F(1) / (_F(1) + exp32(-x))
    return s * (_F(1) + x * (_F(1) - s))


@compiled
def _backward(x, dq, dk, dv, dx):
    H, D = dq.shape[1:]
    for n in prange(len(x)):
        for h in range(H):
            at = 3 * h * D
            for d in range(D):
                dx[n, at + d] = dq[n, h, d] * _silu_grad(x[n, at + d])
            at += D
            for d in range(D):
                dx[n, at + d] = dk[n, h, d] * _silu_grad(x[n, at + d])
            at += D
            for d in range(D):
                dx[n, at + d] = dv[n, h, d] * _silu_grad(x[n, at + d])
