"""RMSNorm, with or without a sigmoid gate, in one pass each way.

A program holds whole rows in registers, so the backward takes the statistic from the input again
and saves nothing for it. The weight's gradient is summed by a fixed number of programs, each over
its own rows, and then over the programs: the same bits in every run on one kind of device.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import (
    as_rows,
    cdiv,
    num_programs,
    row_tile,
    walking_stages,
    walking_tile,
)
from sevenfold.ops.triton_column_sum import column_sum
from sevenfold.ops.triton_launched import launched
from sevenfold.ops.triton_overlap import wait_for_last


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, x_stride, gate_stride, num_rows, D, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < D)
    x = tl.load(x_ptr + row * x_stride + column, inside, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < D, 0.0).to(tl.float32)
    if gate_ptr is not None:  # before the sum, which waits for every thread
        gate = tl.load(gate_ptr + row * gate_stride + column, inside, 0.0).to(tl.float32)
        weight *= tl.sigmoid(gate)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / D + eps))
    y = x * r * weight
    tl.store(y_ptr + row * D + column, y, inside)


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dy_ptr, x_ptr, gate_ptr, weight_ptr, dx_ptr, dgate_ptr, partial_ptr,
    dy_stride, x_stride, gate_stride, num_rows, D, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, column < D, 0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    stride = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, stride, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < num_rows) & (column < D)
        x = tl.load(x_ptr + row * x_stride + column, inside, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, inside, 0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + row * gate_stride + column, inside, 0.0).to(tl.float32)
            share = tl.sigmoid(gate)
            dy *= share
        scaled = dy * weight  # the gradient of the normalised x
        square, shared = tl.sum(x * x, 1, keep_dims=True), tl.sum(scaled * x, 1, keep_dims=True)
        r = tl.div_rn(1.0, tl.sqrt_rn(square / D + eps))
        normed = x * r
        dweight += dy * normed
        dx = (scaled - normed * (shared * r / D)) * r
        tl.store(dx_ptr + row * D + column, dx, inside)
        if gate_ptr is not None:
            dgate = scaled * normed * (1 - share)
            tl.store(dgate_ptr + row * D + column, dgate, inside)
    total = tl.sum(dweight, 0, keep_dims=True)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + column, total, column < D)


def normed(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The norm, gated where there is a gate, past torch.library: for inference."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, gates = as_rows(x), None if gate is None else as_rows(gate)
    tile = row_tile(x.shape[-1])
    gate_stride = 0 if gates is None else gates.stride(0)
    _forward_kernel[(cdiv(len(rows), tile.rows),)](
        rows, gates, weight.contiguous(), y, rows.stride(0), gate_stride, *rows.shape, eps,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, **overlapping(y),
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = None if gate is None else torch.empty_like(dx)
    if dx.numel() == 0:
        return dx, dgate, torch.zeros_like(weight)
    tile, rows, dys = walking_tile(x.shape[-1]), as_rows(x), as_rows(dy)
    gates = None if gate is None else as_rows(gate)
    programs = num_programs(x.device, cdiv(len(rows), tile.rows), tile)
    partial = torch.empty(programs, len(weight), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        dys, rows, gates, weight.contiguous(), dx, dgate, partial,
        dys.stride(0), rows.stride(0), 0 if gates is None else gates.stride(0), *rows.shape, eps,
        ROWS=tile.rows, COLUMNS=tile.columns, STAGES=walking_stages(tile, x.element_size()),
        num_warps=tile.warps,
    )  # fmt: skip
    return dx, dgate, column_sum(partial, weight.dtype)


@operator("sevenfold::rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm; arguments and result as in the public operator."""
    return normed(x, None, weight, eps)


@operator("sevenfold::rms_norm_backward")
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    dx, _, dweight = _backward(dy, x, None, weight, eps)
    return dx, dweight


@operator("sevenfold::gated_rms_norm")
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gated norm; arguments and result as in the public operator."""
    return normed(x, gate, weight, eps)


@operator("sevenfold::gated_rms_norm_backward")
def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight."""
    dx, dgate, dweight = _backward(dy, x, gate, weight, eps)
    assert dgate is not None
    return dx, dgate, dweight


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


rms_norm.register_fake(lambda x, weight, eps: _like(x))
gated_rms_norm.register_fake(lambda x, gate, weight, eps: _like(x))
rms_norm_backward.register_fake(lambda dy, x, weight, eps: (_like(x), _like(weight)))
gated_rms_norm_backward.register_fake(
    lambda dy, x, gate, weight, eps: (_like(x), _like(x), _like(weight))
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rms_norm_grads(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


def _gated_rms_norm_grads(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *gated_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


rms_norm.register_autograd(_rms_norm_grads, setup_context=_save)
gated_rms_norm.register_autograd(_gated_rms_norm_grads, setup_context=_save)
