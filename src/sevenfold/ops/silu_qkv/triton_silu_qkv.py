"""SiLU of a projection and the parting into q, k and v, in one pass each way.

The parting costs nothing, for each element is read and written once anyway, and it leaves q, k and
v as the attention kernels like them. The gradients come back as three tensors; joining them first
would read and write them once more.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_launched import launched

_TILE_ELEMENTS, _WARPS = 2048, 4


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_gradient(dy, x):
    share = tl.sigmoid(x)
    return dy * share * (1 + x * (1 - share))


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, num_rows, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < D)
    source, target = qkv_ptr + row * 3 * D + column, row * D + column
    q = tl.load(source, inside, 0.0).to(tl.float32)
    k = tl.load(source + D, inside, 0.0).to(tl.float32)
    v = tl.load(source + 2 * D, inside, 0.0).to(tl.float32)
    tl.store(q_ptr + target, _silu(q), inside)
    tl.store(k_ptr + target, _silu(k), inside)
    tl.store(v_ptr + target, _silu(v), inside)


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, dqkv_ptr, num_rows, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < D)
    whole, part = row * 3 * D + column, row * D + column
    q = tl.load(qkv_ptr + whole, inside, 0.0).to(tl.float32)
    k = tl.load(qkv_ptr + whole + D, inside, 0.0).to(tl.float32)
    v = tl.load(qkv_ptr + whole + 2 * D, inside, 0.0).to(tl.float32)
    dq = tl.load(dq_ptr + part, inside, 0.0).to(tl.float32)
    dk = tl.load(dk_ptr + part, inside, 0.0).to(tl.float32)
    dv = tl.load(dv_ptr + part, inside, 0.0).to(tl.float32)
    tl.store(dqkv_ptr + whole, _silu_gradient(dq, q), inside)
    tl.store(dqkv_ptr + whole + D, _silu_gradient(dk, k), inside)
    tl.store(dqkv_ptr + whole + 2 * D, _silu_gradient(dv, v), inside)


def _tile(D: int) -> tuple[int, int]:
    columns = next_power_of_2(D)
    return max(1, _TILE_ELEMENTS // columns), columns


def _parts(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:-1], num_heads, qkv.shape[-1] // (3 * num_heads))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    return q, k, v


@operator("sevenfold::silu_qkv")
def silu_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; arguments and results as in the public operator."""
    q, k, v = _parts(qkv, num_heads)
    if q.numel() == 0:
        return q, k, v
    D = q.shape[-1]
    num_rows, (rows, columns) = q.numel() // D, _tile(D)
    _forward_kernel[(cdiv(num_rows, rows),)](
        qkv.contiguous(), q, k, v, num_rows, D, ROWS=rows, COLUMNS=columns, num_warps=_WARPS
    )
    return q, k, v


@operator("sevenfold::silu_qkv_backward")
def silu_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor) -> Tensor:
    """The gradient of qkv."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv
    D = dq.shape[-1]
    num_rows, (rows, columns) = dq.numel() // D, _tile(D)
    _backward_kernel[(cdiv(num_rows, rows),)](
        dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv.contiguous(), dqkv, num_rows, D,
        ROWS=rows, COLUMNS=columns, num_warps=_WARPS,
    )  # fmt: skip
    return dqkv


silu_qkv.register_fake(_parts)
silu_qkv_backward.register_fake(
    lambda dq, dk, dv, qkv: torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0])


def _grads(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
    return silu_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None


silu_qkv.register_autograd(_grads, setup_context=_save)
