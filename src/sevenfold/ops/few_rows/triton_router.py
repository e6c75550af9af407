"""A norm and the router's choice after it, of a few rows, in one kernel.

    u = RMSNorm(x), rounded    z = W_r u in fp32    the k largest, weights softmax over them

A program has one row, whose products with an fp32 weight are fp32's, as a router's are everywhere.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.few_rows.types import Norm
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last

_WARPS, _STAGES = 8, 2
_TILE_ELEMENTS = 16384  # weights in the hands of one program


class Choice(NamedTuple):
    """u [M, D] in x's dtype; experts [M, k] int32 and their weights [M, k] fp32, largest first."""

    u: Tensor
    experts: Tensor
    weights: Tensor


@triton.jit
def _router_part(router, norm, E, k, K, EXPERTS: tl.constexpr):
    """Some columns k of the router [EXPERTS, BK], and of the norm's weight."""
    e = tl.arange(0, EXPERTS)
    at = router + e[:, None] * K + k[None, :]
    w = tl.load(at, mask=(e < E)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    return w, tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _choose_kernel(
    x, norm, router, u, experts, weights, E, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, BK: tl.constexpr,
    CHOSEN: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, EXPERTS)
    column = tl.arange(0, COLUMNS)
    x += row * K
    u += row * K
    if BK == COLUMNS:  # all of the router at once, which no kernel before writes
        w, scale = _router_part(router, norm, E, column, K, EXPERTS)
    wait_for_last(OVERLAPS)
    wide = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, axis=0) / K + eps))
    if BK == COLUMNS:
        normed = (wide * r * scale).to(x.dtype.element_ty)
        tl.store(u + column, normed, mask=column < K)
        logits = tl.sum(w * normed.to(tl.float32)[None, :], axis=1)
    else:
        logits = tl.zeros([EXPERTS], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            part = tl.load(x + k, mask=k < K, other=0.0)
            w, scale = _router_part(router, norm, E, k, K, EXPERTS)
            normed = (part.to(tl.float32) * r * scale).to(part.dtype)
            tl.store(u + k, normed, mask=k < K)
            logits += tl.sum(w * normed.to(tl.float32)[None, :], axis=1)
    left = tl.where(e < E, logits, float("-inf"))
    largest, total = tl.max(left, axis=0), 0.0
    # Of the j-th expert at place j, beyond the choices anything.
    chosen, shares = tl.zeros([EXPERTS], tl.int32), tl.zeros([EXPERTS], tl.float32)
    for j in tl.static_range(CHOSEN):
        # Never beyond the last expert, not even where all logits are NaN.
        expert = tl.minimum(tl.argmax(left, axis=0), E - 1)
        share = tl.exp(tl.max(left, axis=0) - largest)
        chosen, shares = tl.where(e == j, expert, chosen), tl.where(e == j, share, shares)
        total += share
        left = tl.where(e == expert, float("-inf"), left)
    at = row * CHOSEN + e
    tl.store(experts + at, chosen, mask=e < CHOSEN)
    tl.store(weights + at, shares / total, mask=e < CHOSEN)


def choose(x: Tensor, norm: Norm, router: Tensor, num_chosen: int) -> Choice:
    """Normalise rows x [M, K], and choose by the router's weight [E, K]."""
    (M, K), E = x.shape, len(router)
    experts = torch.empty(M, num_chosen, dtype=torch.int32, device=x.device)
    weights = torch.empty(M, num_chosen, dtype=torch.float32, device=x.device)
    u, columns, padded = torch.empty_like(x), next_power_of_2(K), max(2, next_power_of_2(E))
    _choose_kernel[(M,)](
        x, norm.weight, router, u, experts, weights, E, norm.eps,
        K=K, COLUMNS=columns, EXPERTS=padded, BK=min(columns, _TILE_ELEMENTS // padded),
        CHOSEN=num_chosen, STAGES=_STAGES, num_warps=_WARPS, **overlapping(x),
    )  # fmt: skip
    return Choice(u, experts, weights)
