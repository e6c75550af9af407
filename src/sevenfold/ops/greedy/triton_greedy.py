"""The greedy choice as one Triton kernel: a row's largest logit and its check, in one read.

Logits are compared as integers in the same order, among which a NaN comes last; the two zeros are
one number. A program has one row, which its thousand threads read at once.

A decoding step that is recorded ends in this kernel, which leaves what the next one reads of each
row where this one read it.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last

_BLOCK, _WARPS, _STAGES = 8192, 32, 4


@triton.jit
def _largest(row, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The first of a row's largest logits, and whether all of them are numbers."""
    i = tl.arange(0, BLOCK)
    least: tl.constexpr = -(2**31)
    best, place = tl.full([BLOCK], least, tl.int32), tl.zeros([BLOCK], tl.int32)
    good = tl.full([BLOCK], 1, tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        inside = start + i < V
        z = tl.load(row + start + i, mask=inside, other=0.0)
        good &= (tl.abs(z) < float("inf")).to(tl.int32)
        bits = z.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(z == 0, 0, tl.where(z == z, key, 0x7FFFFFFF))
        key = tl.where(inside, key, least)
        place = tl.where(key > best, start + i, place)
        best = tl.maximum(key, best)
    top = tl.max(best, axis=0)
    return tl.min(tl.where(best == top, place, V), axis=0), tl.min(good, axis=0) != 0


@triton.jit
def _greedy_kernel(
    logits, tokens, finite, row_stride, V,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    token, good = _largest(logits + row * row_stride, V, BLOCK, STAGES)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(finite + row, good)


@triton.jit
def _advance_kernel(
    logits, chosen, places, pages, row_stride, V, N, M, page_tokens,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    places += row
    position, keys = tl.load(places) + 1, tl.load(places + 3 * N)
    page = tl.load(pages + row * M + tl.minimum(position // page_tokens, M - 1))
    token, good = _largest(logits + row * row_stride, V, BLOCK, STAGES)
    tl.store(chosen + 2 * row, token.to(tl.int64))
    tl.store(chosen + 2 * row + 1, good.to(tl.int64))
    if keys > 0:
        tl.store(places, position)
        tl.store(places + N, page)
        tl.store(places + 2 * N, position % page_tokens)
        tl.store(places + 3 * N, keys + 1)


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as the public operator's."""
    logits = _by_rows(logits)
    N, V = logits.shape
    tokens = torch.empty(N, dtype=torch.int64, device=logits.device)
    finite = torch.empty(N, dtype=torch.bool, device=logits.device)
    if N:
        _greedy_kernel[(N,)](logits, tokens, finite, logits.stride(0), V, **_constants(logits))
    return tokens, finite


def advance_rows(
    logits: Tensor, chosen: Tensor, places: Tensor, pages: Tensor, page_tokens: int
) -> None:
    """Arguments as the public operator's."""
    logits, M = _by_rows(logits), pages.shape[1]
    N, V = logits.shape
    sizes = (logits.stride(0), V, N, M, page_tokens)
    _advance_kernel[(N,)](logits, chosen, places, pages, *sizes, **_constants(logits))


def _by_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _constants(logits: Tensor) -> dict[str, int | bool]:
    block = min(_BLOCK, next_power_of_2(logits.shape[1]))
    return {"BLOCK": block, "STAGES": _STAGES, "num_warps": _WARPS, **overlapping(logits)}
