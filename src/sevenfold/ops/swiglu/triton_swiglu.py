"""SwiGLU's elementwise part in one pass each way; the backward reads the input again."""

# Triton's decorator hides how a kernel is launched.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.operator import operator
from sevenfold.ops.row_launch import as_rows, cdiv, next_power_of_2
from sevenfold.ops.triton_launched import launched

# Measured on an H200, 32,768 x 1792 bf16: one row of 2,048 columns reaches 95% of the copy rate
# forward and 98% backward, 4 rows of 512 columns 90% and 94%.
_TILE_ELEMENTS, _WARPS = 2048, 4


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    gate_up_ptr, y_ptr, stride, num_rows, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < F)
    gate = tl.load(gate_up_ptr + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + F + column, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + row * F + column, gate * tl.sigmoid(gate) * up, inside)


@launched
@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr, dy_stride, stride, num_rows, F,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < F)
    gate = tl.load(gate_up_ptr + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + F + column, inside, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1 + gate * (1 - share))
    tl.store(dgate_up_ptr + row * 2 * F + column, dgate, inside)
    tl.store(dgate_up_ptr + row * 2 * F + F + column, dy * gate * share, inside)


def _tile(F: int) -> dict[str, int]:
    columns = min(_TILE_ELEMENTS, next_power_of_2(F))
    return {"ROWS": _TILE_ELEMENTS // columns, "COLUMNS": columns}


def _grid(num_rows: int, F: int) -> tuple[int, int]:
    tile = _tile(F)
    return cdiv(num_rows, tile["ROWS"]), cdiv(F, tile["COLUMNS"])


@operator("sevenfold::swiglu")
def swiglu(gate_up: Tensor) -> Tensor:
    """The product; argument and result as in the public operator."""
    y = _half(gate_up)
    if y.numel() == 0:
        return y
    rows, F = as_rows(gate_up), y.shape[-1]
    _forward_kernel[_grid(len(rows), F)](
        rows, y, rows.stride(0), len(rows), F, num_warps=_WARPS, **_tile(F)
    )
    return y


@operator("sevenfold::swiglu_backward")
def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up."""
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if dgate_up.numel() == 0:
        return dgate_up
    dys, rows, F = as_rows(dy), as_rows(gate_up), dy.shape[-1]
    _backward_kernel[_grid(len(rows), F)](
        dys, rows, dgate_up, dys.stride(0), rows.stride(0), len(rows), F,
        num_warps=_WARPS, **_tile(F),
    )  # fmt: skip
    return dgate_up


def _half(gate_up: Tensor) -> Tensor:
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    return torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)


swiglu.register_fake(_half)
swiglu_backward.register_fake(
    lambda dy, gate_up: torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, dy: Tensor) -> Tensor:
    return swiglu_backward(dy, *ctx.saved_tensors)


swiglu.register_autograd(_grads, setup_context=_save)
