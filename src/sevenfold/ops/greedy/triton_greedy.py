"""The greedy choice as Triton kernels: a row's largest logit and its check, in one read.

Logits are compared as integers in the same order, among which a NaN comes last; the two zeros are
one number. A program has a share of one row, as one alone would read 32,000 logits for longer than
two kernels take; the second goes over the shares of a row.

A decoding step that is recorded ends in that one, which leaves what the next step reads of each row
where this one read it.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last

_SHARE = 2048  # logits of a program


@triton.jit
def _share_kernel(
    logits, shares, row_stride, V, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The first of a share's largest logits as its key and its place, and whether all are numbers.

    shares: [rows, shares, 3] int32.
    """
    wait_for_last(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = share * BLOCK + tl.arange(0, BLOCK)
    least: tl.constexpr = -(2**31)
    z = tl.load(logits + row * row_stride + i, mask=i < V, other=0.0)
    bits = z.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(z == 0, 0, tl.where(z == z, key, 0x7FFFFFFF))
    key = tl.where(i < V, key, least)
    top = tl.max(key, axis=0)
    shares += (row * tl.num_programs(1) + share) * 3
    tl.store(shares, top)
    tl.store(shares + 1, tl.min(tl.where(key == top, i, V), axis=0))
    tl.store(shares + 2, tl.min((tl.abs(z) < float("inf")).to(tl.int32), axis=0))


@triton.jit
def _largest(shares, row, V, S, SHARES: tl.constexpr):
    """The first of a row's largest logits, and whether all of them are numbers."""
    s = tl.arange(0, SHARES)
    at, there = shares + (row * S + s) * 3, s < S
    best = tl.load(at, mask=there, other=-(2**31))
    place = tl.load(at + 1, mask=there, other=V)
    good = tl.load(at + 2, mask=there, other=1)
    top = tl.max(best, axis=0)
    return tl.min(tl.where(best == top, place, V), axis=0), tl.min(good, axis=0) != 0


@triton.jit
def _greedy_kernel(
    shares, tokens, finite, V, S, SHARES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    token, good = _largest(shares, row, V, S, SHARES)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(finite + row, good)


@triton.jit
def _advance_kernel(
    shares, chosen, places, pages, V, S, N, M, page_tokens,
    SHARES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    places += row
    position, keys = tl.load(places) + 1, tl.load(places + 3 * N)
    page = tl.load(pages + row * M + tl.minimum(position // page_tokens, M - 1))
    token, good = _largest(shares, row, V, S, SHARES)
    tl.store(chosen + 2 * row, token.to(tl.int64))
    tl.store(chosen + 2 * row + 1, good.to(tl.int64))
    if keys > 0:
        tl.store(places, position)
        tl.store(places + N, page)
        tl.store(places + 2 * N, position % page_tokens)
        tl.store(places + 3 * N, keys + 1)


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as the public operator's."""
    N, V = logits.shape
    tokens = torch.empty(N, dtype=torch.int64, device=logits.device)
    finite = torch.empty(N, dtype=torch.bool, device=logits.device)
    if N:
        shares = _shares(logits)
        _greedy_kernel[(N,)](shares, tokens, finite, V, shares.shape[1], **_constants(shares))
    return tokens, finite


def advance_rows(
    logits: Tensor, chosen: Tensor, places: Tensor, pages: Tensor, page_tokens: int
) -> None:
    """Arguments as the public operator's."""
    (N, V), M, shares = logits.shape, pages.shape[1], _shares(logits)
    sizes = (V, shares.shape[1], N, M, page_tokens)
    _advance_kernel[(N,)](shares, chosen, places, pages, *sizes, **_constants(shares))


def _shares(logits: Tensor) -> Tensor:
    """[N, shares, 3] int32, what each share of a row has: the kernel's result."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    N, V = logits.shape
    num_shares = cdiv(V, _SHARE)
    shares = torch.empty(N, num_shares, 3, dtype=torch.int32, device=logits.device)
    _share_kernel[(N, num_shares)](
        logits, shares, logits.stride(0), V, BLOCK=_SHARE, num_warps=4, **overlapping(logits)
    )
    return shares


def _constants(shares: Tensor) -> dict[str, int | bool]:
    width = max(16, next_power_of_2(shares.shape[1]))
    return {"SHARES": width, "num_warps": 1, **overlapping(shares)}
