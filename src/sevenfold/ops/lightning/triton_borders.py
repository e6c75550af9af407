"""States at borders as Triton kernels, which read of a span what a head has not forgotten."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.lightning.horizons import HORIZONS
from sevenfold.ops.lightning.triton_scan import power, rate, reach
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_launched import launched

_CHUNK = 64
# A head's tokens are added in so many parts side by side.
_PARTS = 16
_SUM_BLOCK = 1024
# Key columns that are read in one sum of fp32.
_FP32_SUM = 64


@triton.jit
def _near(log_decay, head, horizon, spans, n):
    """Start and length of a span, and how many of its tokens next to the border count."""
    start, length = tl.load(spans + 2 * n), tl.load(spans + 2 * n + 1)
    return start, length, tl.minimum(length, reach(rate(log_decay, head), horizon) + 1)


@triton.jit
def _part_tokens(count, C: tl.constexpr, PARTS: tl.constexpr):
    """Tokens of each part, whole chunks; the last parts may have none."""
    return tl.cdiv(tl.cdiv(count, PARTS), C) * C


@triton.jit
def _rows_of(start, length, near, FROM_END: tl.constexpr):
    """Tokens that are so near to the border, and their distances from it."""
    if FROM_END:
        return start + length - 1 - near, near
    return start + near, near + 1


@launched
@triton.jit
def added_kernel(
    a, b, parts, log_decay, horizon, spans, a_token, a_head, b_token, b_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, FROM_END: tl.constexpr,
):  # fmt: skip
    """What a part of a span's tokens adds for one head and BV value columns; [N, H, PARTS, K, V].

    Parts without tokens are not written.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    part, head, n = tl.program_id(0) // tiles, tl.program_id(1), tl.program_id(2)
    start, length, count = _near(log_decay, head, horizon, spans, n)
    size = _part_tokens(count, C, PARTS)
    first = part * size
    end = tl.minimum(first + size, count)
    k_columns, v_columns = tl.arange(0, BK), (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
    log2_decay = rate(log_decay, head)
    S = tl.zeros([BK, BV], dtype=tl.float32)
    for chunk in range(tl.cdiv(tl.maximum(end - first, 0), C)):
        near = first + chunk * C + tl.arange(0, C)
        rows, distance = _rows_of(start, length, near, FROM_END)
        rows = rows.to(tl.int64)[:, None]
        inside = (near < end)[:, None]
        at = a + rows * a_token + head * a_head + k_columns[None, :]
        ac = tl.load(at, inside & (k_columns < K)[None, :], other=0.0)
        at = b + rows * b_token + head * b_head + v_columns[None, :]
        bc = tl.load(at, inside & (v_columns < V)[None, :], other=0.0)
        faded = (bc.to(tl.float32) * power(log2_decay, distance)[:, None]).to(bc.dtype)
        S += tl.dot(tl.trans(ac), faded, input_precision="ieee")
    if first < count:
        cell = k_columns[:, None] * V + v_columns[None, :]
        to = ((n * tl.num_programs(1) + head) * PARTS + part).to(tl.int64) * (K * V)
        tl.store(parts + to + cell, S, (k_columns < K)[:, None] & (v_columns < V)[None, :])


@launched
@triton.jit
def sum_kernel(
    parts, states, log_decay, horizon, spans,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sum of a head's parts that have tokens, in their order."""
    head, n = tl.program_id(1), tl.program_id(2)
    _, _, count = _near(log_decay, head, horizon, spans, n)
    used = tl.cdiv(count, tl.maximum(_part_tokens(count, C, PARTS), 1))
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (n * tl.num_programs(1) + head).to(tl.int64)
    S = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(used):
        S += tl.load(parts + (row * PARTS + part) * CELLS + cell, cell < CELLS, other=0.0)
    tl.store(states + row * CELLS + cell, S, cell < CELLS)


@launched
@triton.jit
def add_read_kernel(
    y, x, states, log_decay, horizon, spans, y_token, y_head, x_token, x_head, state_k, state_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FROM_END: tl.constexpr,
):  # fmt: skip
    """C tokens of one head; states are [N, H, K, V], their matrices in any order in memory.

    BK key columns are added up at a time: fp32 in one sum of 256 loses twice what products lose.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    head, n = tl.program_id(1), tl.program_id(2)
    start, length, count = _near(log_decay, head, horizon, spans, n)
    near = (tl.program_id(0) // tiles) * C + tl.arange(0, C)
    if (tl.program_id(0) // tiles) * C < count:
        v_columns = (tl.program_id(0) % tiles) * BV + tl.arange(0, BV)
        rows, distance = _rows_of(start, length, near, FROM_END)
        rows = rows.to(tl.int64)[:, None]
        inside, v_inside = (near < count)[:, None], (v_columns < V)[None, :]
        matrix = states + (n * tl.num_programs(1) + head).to(tl.int64) * (K * V)
        faded = power(rate(log_decay, head), distance)[:, None]
        found = tl.zeros([C, BV], dtype=tl.float32)
        for first in tl.static_range(0, K, BK):
            k_columns = first + tl.arange(0, BK)
            at = x + rows * x_token + head * x_head + k_columns[None, :]
            xc = tl.load(at, inside & (k_columns < K)[None, :], other=0.0)
            at = matrix + k_columns[:, None] * state_k + v_columns[None, :] * state_v
            S = tl.load(at, (k_columns < K)[:, None] & v_inside, other=0.0)
            found += tl.dot(xc, S.to(xc.dtype), input_precision="ieee") * faded
        at = y + rows * y_token + head * y_head + v_columns[None, :]
        found += tl.load(at, inside & v_inside, other=0.0).to(tl.float32)
        tl.store(at, found.to(y.dtype.element_ty), inside & v_inside)


def added(
    a: Tensor, b: Tensor, log_decay: Tensor, spans: Sequence[tuple[int, int]], from_end: bool
) -> Tensor:
    """Arguments and result as lightning_added's."""
    (_, H, K), V, N = a.shape, b.shape[2], len(spans)
    a, b = _rows(a), _rows(b)
    states = a.new_empty(N, H, K, V, dtype=torch.float32)
    parts = a.new_empty(N, H, _PARTS, K, V, dtype=torch.float32)
    BK, BV = _tile(a, V)
    where = (log_decay, HORIZONS[a.dtype], _on_device(tuple(spans), a.device))
    added_kernel[(_PARTS * cdiv(V, BV), H, N)](
        a, b, parts, *where, *a.stride()[:2], *b.stride()[:2],
        K=K, V=V, BK=BK, BV=BV, C=_CHUNK, PARTS=_PARTS, FROM_END=from_end, num_warps=8,
    )  # fmt: skip
    sum_kernel[(cdiv(K * V, _SUM_BLOCK), H, N)](
        parts, states, *where, CELLS=K * V, BLOCK=_SUM_BLOCK, C=_CHUNK, PARTS=_PARTS, num_warps=4
    )
    return states


def add_read(
    y: Tensor,
    x: Tensor,
    states: Tensor,
    log_decay: Tensor,
    spans: Sequence[tuple[int, int]],
    from_end: bool,
) -> None:
    """Arguments as lightning_add_read's."""
    (_, H, K), V, N = x.shape, y.shape[2], len(spans)
    x, longest = _rows(x), max(length for _, length in spans)
    if states.stride()[:2] != (H * K * V, K * V):
        states = states.contiguous()
    if longest == 0:
        return
    BK, BV = _tile(x, V)
    add_read_kernel[(cdiv(longest, _CHUNK) * cdiv(V, BV), H, N)](
        y, x, states, log_decay, HORIZONS[x.dtype], _on_device(tuple(spans), x.device),
        *y.stride()[:2], *x.stride()[:2], *states.stride()[2:],
        K=K, V=V, BK=min(BK, _FP32_SUM) if x.itemsize == 4 else BK, BV=BV, C=_CHUNK,
        FROM_END=from_end, num_warps=4,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _tile(x: Tensor, V: int) -> tuple[int, int]:
    """Columns of keys [T, H, K], and of the values of one program: what registers hold."""
    BK, most = max(16, next_power_of_2(x.shape[2])), 2**14 if x.itemsize == 2 else 2**11
    return BK, max(16, min(next_power_of_2(V), 128, most // BK))


@lru_cache(maxsize=64)
def _on_device(spans: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[N, 2] int32, sent once for all layers of a batch, without waiting."""
    table = torch.tensor(spans, dtype=torch.int32).view(-1, 2)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
