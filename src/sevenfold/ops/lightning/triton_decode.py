"""One token a sequence, the state read and written in place: the Triton form."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.lightning.triton_decode_common import (
    check_runnable,
    contiguous_widths,
    load_log_decay,
    power,
    tuning,
)
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import cdiv, next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last


@triton.jit
def _decode_kernel(
    q, k, v, log_decay, pool, into, slots, o, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, pool_slot,
    H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A program owns BV value columns of one sequence's head; `into` may be the pool."""
    wait_for_last(OVERLAPS)
    tiles: tl.constexpr = (V + BV - 1) // BV
    bh, part = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (bh // H).to(tl.int64), bh % H
    slot = tl.load(slots + b).to(tl.int64)
    ik, iv = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    # All loads before the first is used: a layout that changes between them would wait for each.
    query = tl.load(q + b * q_row + h * q_head + ik, mask=in_k, other=0.0)
    key = tl.load(k + b * k_row + h * k_head + ik, mask=in_k, other=0.0)
    value = tl.load(v + b * v_row + h * v_head + iv, mask=in_v, other=0.0)
    rate = load_log_decay(log_decay, h)
    if slot < 0:
        tl.store(o + bh.to(tl.int64) * V + iv, tl.zeros([BV], o.dtype.element_ty), mask=in_v)
        return
    at = slot * pool_slot + h * K * V + ik[:, None] * V + iv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(pool + at, mask=inside, other=0.0)
    added = key.to(tl.float32)[:, None] * value.to(tl.float32)[None, :]
    state = power(rate, 1.0) * state + added
    tl.store(into + at, state, mask=inside)
    out = scale * tl.sum(query.to(tl.float32)[:, None] * state, axis=0)
    tl.store(o + bh.to(tl.int64) * V + iv, out.to(o.dtype.element_ty), mask=in_v)


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pool: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator."""
    return _run(q, k, v, log_decay, pool, pool, slots, scale)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run one token of every sequence; arguments and result as in lightning_attention_step."""
    state = state.contiguous()
    after = torch.empty_like(state)
    slots = torch.arange(len(q), device=q.device)
    return _run(q, k, v, log_decay, state, after, slots, scale), after


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    into: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    (B, H, K), V = q.shape, v.shape[-1]
    check_runnable(_decode_kernel, q, V)
    o = q.new_empty(B, H, V)
    q, k, v = (contiguous_widths(x) for x in (q, k, v))
    config = tuning("lightning_decode", B * H, K, q.device)
    BV = min(config["BV"], next_power_of_2(V))
    if o.numel():
        _decode_kernel[(B * H * cdiv(V, BV),)](
            q, k, v, log_decay, pool, into, slots, o, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], pool.stride(0),
            H, K=K, V=V, BK=next_power_of_2(K), BV=BV, num_warps=config["num_warps"],
            **overlapping(o),
        )  # fmt: skip
    return o
