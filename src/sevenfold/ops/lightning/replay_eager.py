"""Replay, verification and commit in plain PyTorch: all sequences at once.

n sequences that are not skipped, T draft tokens, R rows of the ring, P tokens pending in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Pending(NamedTuple):
    """The tokens that the states lack, in order and without the rejected ones between them."""

    k: Tensor  # [n, H, R, K]
    v: Tensor  # [n, H, R, V]
    num: Tensor  # [n] P; the rows from P on are zero


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    scale: float,
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator."""
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    o = verify(q, k, v, log_decay, pool, slots, None, None, scale)
    pool[3][slots[slots >= 0]] += 1
    return o.squeeze(1)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
) -> Tensor:
    """Run a draft of every sequence; arguments and result as in the public operator."""
    B, T = q.shape[:2]
    if ancestors is None:
        ancestors = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().expand(B, T, T)
    rows = (slots >= 0).nonzero().squeeze(1)
    taken, sees, dtype = slots[rows], ancestors[rows], pool[0].dtype
    pending = _pending(pool, taken, None if accepted is None else accepted[rows])
    q_, k_, v_ = (x[rows].transpose(1, 2).to(dtype) for x in (q, k, v))  # [n, H, T, K or V]
    depth = sees.sum(-1) - 1
    away = torch.where(sees, depth[:, :, None] - depth[:, None, :], -1)
    P, i = pending.num[:, None], torch.arange(pending.k.shape[2], device=q.device)
    past = torch.where((i < P)[:, None, :], (P + depth)[:, :, None] - i, -1)
    got = _power(log_decay, P + depth + 1, dtype).unsqueeze(-1) * (q_ @ pool[0][taken])
    got += (q_ @ pending.k.to(dtype).mT * _power(log_decay, past, dtype)) @ pending.v.to(dtype)
    got += (q_ @ k_.mT * _power(log_decay, away, dtype)) @ v_
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    o[rows] = (scale * got).transpose(1, 2).to(v.dtype)
    _append(pool, taken, pending, log_decay, k[rows], v[rows])
    return o


def commit(
    log_decay: Tensor, pool: Sequence[Tensor], slots: Tensor, accepted: Tensor | None
) -> None:
    """Fold every accepted token into its state; arguments as in the public operator."""
    rows = (slots >= 0).nonzero().squeeze(1)
    pending = _pending(pool, slots[rows], None if accepted is None else accepted[rows])
    _fold(pool[0], slots[rows], pending, log_decay)
    pool[3][slots[rows]] = 0


def _pending(pool: Sequence[Tensor], taken: Tensor, accepted: Tensor | None) -> _Pending:
    _, ring_k, ring_v, count = pool
    num = count[taken, 0]
    i = torch.arange(ring_k.shape[2], device=num.device).expand(len(taken), -1)
    source = i
    if accepted is not None and accepted.shape[1] > 0:
        drafted = i - num[:, None]  # the i-th pending token is the accepted one of this index
        A = accepted.shape[1]
        chosen = accepted.long().gather(1, drafted.clamp(0, A - 1))
        chosen = torch.where((drafted >= 0) & (drafted < A), chosen, -1)
        source = torch.where(chosen >= 0, num[:, None] + chosen, i)
        num = num + (chosen >= 0).sum(1)
    # What a slot's last user left behind may be a NaN, which no weight of zero removes.
    stale = (i >= num[:, None])[:, None, :, None]
    at = torch.arange(len(taken), device=num.device)[:, None]
    k, v = (
        ring[taken].transpose(1, 2)[at, source].transpose(1, 2).masked_fill(stale, 0)
        for ring in (ring_k, ring_v)
    )
    return _Pending(k, v, num)


def _fold(state: Tensor, taken: Tensor, pending: _Pending, log_decay: Tensor) -> None:
    """Write the states after what is pending."""
    k, v = (x.to(state.dtype) for x in pending[:2])
    P, i = pending.num[:, None], torch.arange(k.shape[2], device=k.device)
    left = _power(log_decay, P - 1 - i, state.dtype).unsqueeze(-1)
    decay = _power(log_decay, P, state.dtype).unsqueeze(-1)
    state[taken] = decay * state[taken] + (left * k).mT @ v


def _append(
    pool: Sequence[Tensor],
    taken: Tensor,
    pending: _Pending,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """Put the draft k, v [n, T, H, K or V] behind what is pending; fold first where it must."""
    state, ring_k, ring_v, count = pool
    T, R = k.shape[1], ring_k.shape[2]
    full = pending.num + T > R
    folded = _Pending(pending.k[full], pending.v[full], pending.num[full])
    _fold(state, taken[full], folded, log_decay)
    base = torch.where(full, 0, pending.num)
    at = torch.arange(len(taken), device=k.device)[:, None]
    row = base[:, None] + torch.arange(T, device=k.device)
    for ring, kept, drafted in ((ring_k, pending.k, k), (ring_v, pending.v, v)):
        new = kept.transpose(1, 2).contiguous()  # [n, R, H, K or V]
        new[at, row] = drafted
        ring[taken] = new.transpose(1, 2)
    count[taken] = base[:, None].to(count.dtype)


def _power(log_decay: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """decay^distance, [n, H, ...] for distance [n, ...]; 0 where the distance is negative."""
    # Finite, so that an infinite decay times no distance is 1 and not NaN.
    rate = log_decay.to(dtype).clamp(min=torch.finfo(dtype).min)
    distance = distance.unsqueeze(1)
    rate = rate.view(-1, *(1,) * (distance.dim() - 2))
    return torch.exp(rate * distance.clamp(min=0)) * (distance >= 0)
