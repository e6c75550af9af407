"""A residual sum and the RMSNorm that follows it, in one pass each way.

The sum is rounded to its dtype before it is normalised, so that the backward, which reads the sum,
sees the same numbers.
"""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
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


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    stream_ptr, update_ptr, weight_ptr, y_ptr, x_ptr, stream_stride, update_stride,
    num_rows, D, eps, alpha, beta, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < D)
    stream = tl.load(stream_ptr + row * stream_stride + column, inside, 0.0).to(tl.float32)
    update = tl.load(update_ptr + row * update_stride + column, inside, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < D, 0.0).to(tl.float32)
    rounded = (alpha * stream + beta * update).to(y_ptr.dtype.element_ty)
    if x_ptr is not None:
        tl.store(x_ptr + row * D + column, rounded, inside)
    x = rounded.to(tl.float32)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / D + eps))
    tl.store(y_ptr + row * D + column, x * r * weight, inside)


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, dstream_ptr, dupdate_ptr, partial_ptr,
    dy_stride, dsum_stride, num_rows, D, eps, alpha, beta,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(weight_ptr + column, column < D, 0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    stride = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, stride, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < num_rows) & (column < D)
        x = tl.load(x_ptr + row * D + column, inside, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, inside, 0.0).to(tl.float32)
        scaled = dy * weight  # the gradient of the normalised x
        square, shared = tl.sum(x * x, 1, keep_dims=True), tl.sum(scaled * x, 1, keep_dims=True)
        r = tl.div_rn(1.0, tl.sqrt_rn(square / D + eps))
        normed = x * r
        dweight += dy * normed
        dx = (scaled - normed * (shared * r / D)) * r
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * dsum_stride + column, inside, 0.0).to(tl.float32)
        tl.store(dstream_ptr + row * D + column, alpha * dx, inside)
        tl.store(dupdate_ptr + row * D + column, beta * dx, inside)
    total = tl.sum(dweight, 0, keep_dims=True)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + column, total, column < D)


@operator("sevenfold::residual_rms_norm")
def residual_rms_norm(
    stream: Tensor, update: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The norm and the sum; arguments and results as in the public operator."""
    y, x = _room(stream, update), _room(stream, update)
    _forward(stream, update, weight, (eps, alpha, beta), y, x)
    return y, x


def post_rms_norm(
    stream: Tensor, update: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
) -> Tensor:
    """The norm alone, past torch.library: for inference."""
    y = _room(stream, update)
    _forward(stream, update, weight, (eps, alpha, beta), y, None)
    return y


def _room(stream: Tensor, update: Tensor) -> Tensor:
    dtype = torch.promote_types(stream.dtype, update.dtype)
    return torch.empty(stream.shape, dtype=dtype, device=stream.device)


def _forward(
    stream: Tensor, update: Tensor, weight: Tensor, factors: tuple[float, float, float],
    y: Tensor, x: Tensor | None,
) -> None:  # fmt: skip
    """Write the norm into y, and the sum into x if there is one; both contiguous."""
    if y.numel() == 0:
        return
    streams, updates, tile = as_rows(stream), as_rows(update), row_tile(y.shape[-1])
    _forward_kernel[(cdiv(len(streams), tile.rows),)](
        streams, updates, weight.contiguous(), y, x, streams.stride(0), updates.stride(0),
        *streams.shape, *factors,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip


@operator("sevenfold::residual_rms_norm_backward")
def residual_rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor,
    stream_dtype: torch.dtype, update_dtype: torch.dtype, eps: float, alpha: float, beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of stream, update and weight."""
    dstream, dupdate = _pair(x, stream_dtype, update_dtype)
    if x.numel() == 0:
        return dstream, dupdate, torch.zeros_like(weight)
    tile, rows, dys = walking_tile(x.shape[-1]), as_rows(x), as_rows(dy)
    dsums = None if dsum is None else as_rows(dsum)
    programs = num_programs(x.device, cdiv(len(rows), tile.rows), tile)
    partial = torch.empty(programs, len(weight), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        dys, dsums, rows, weight.contiguous(), dstream, dupdate, partial,
        dys.stride(0), 0 if dsums is None else dsums.stride(0), *rows.shape, eps, alpha, beta,
        ROWS=tile.rows, COLUMNS=tile.columns, STAGES=walking_stages(tile, x.element_size()),
        num_warps=tile.warps,
    )  # fmt: skip
    return dstream, dupdate, column_sum(partial, weight.dtype)


@residual_rms_norm.register_fake
def _(stream, update, weight, eps, alpha, beta):
    return _room(stream, update), _room(stream, update)


@residual_rms_norm_backward.register_fake
def _(dy, dsum, x, weight, stream_dtype, update_dtype, eps, alpha, beta):
    return *_pair(x, stream_dtype, update_dtype), torch.empty_like(weight)


def _pair(x: Tensor, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in dtypes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    stream, update, weight, *ctx.factors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)
    ctx.dtypes = stream.dtype, update.dtype


def _grads(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    grads = residual_rms_norm_backward(dy, dsum, x, weight, *ctx.dtypes, *ctx.factors)
    return *grads, None, None, None


residual_rms_norm.register_autograd(_grads, setup_context=_save)
