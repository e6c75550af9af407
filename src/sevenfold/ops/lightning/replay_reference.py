"""Replay, verification and commit as the recurrence reads: token after token, any dtype.

It folds what is pending at every call, so the ring never fills; what an output is does not depend
on when a ring is folded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    pool[3][slots[slots >= 0]] = 1
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
        ancestors = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    commit(log_decay, pool, slots, accepted)
    state, ring_k, ring_v, _ = pool
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for t in range(T):
            path = ancestors[b, t].nonzero().flatten().tolist()
            path.sort(key=lambda s, b=b: int(ancestors[b, s].sum()))
            S = _run(state[slot], k[b, path], v[b, path], log_decay)
            o[b, t] = scale * torch.einsum("hk,hkv->hv", q[b, t].to(S.dtype), S)
        ring_k[slot, :, :T], ring_v[slot, :, :T] = k[b].transpose(0, 1), v[b].transpose(0, 1)
    return o


def commit(
    log_decay: Tensor, pool: Sequence[Tensor], slots: Tensor, accepted: Tensor | None
) -> None:
    """Fold every accepted token into its state; arguments as in the public operator."""
    state, ring_k, ring_v, count = pool
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        held = int(count[slot, 0])
        chosen = [] if accepted is None else accepted[b].tolist()
        rows = [*range(held), *(held + t for t in chosen if t >= 0)]
        k, v = (ring[slot, :, rows].transpose(0, 1) for ring in (ring_k, ring_v))
        state[slot] = _run(state[slot], k, v, log_decay)
        count[slot] = 0


def _run(S: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The state after the tokens k [T, H, K] and v [T, H, V]."""
    decay = torch.exp(log_decay.to(S.dtype))[:, None, None]
    for k_HK, v_HV in zip(k.to(S.dtype), v.to(S.dtype), strict=True):
        S = decay * S + k_HK[:, :, None] * v_HV[:, None, :]
    return S
