"""Replay, verification and commit over states in int8 in plain PyTorch.

The slots are taken out as a pool of their own in fp32, and rounded again where they were folded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.ops.lightning import replay_eager
from sevenfold.ops.low_precision import dequantise_rows, quantise_rows


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    scale: float,
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator.

    Args:
        pool: Int8ReplayPool.tensors().
    """
    taken, own = take(pool, slots)
    o = replay_eager.replay(q, k, v, log_decay, taken, own, scale)
    _put_back(pool, slots, taken)
    return o


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
    taken, own = take(pool, slots)
    o = replay_eager.verify(q, k, v, log_decay, taken, own, accepted, ancestors, scale)
    _put_back(pool, slots, taken)
    return o


def commit(
    log_decay: Tensor, pool: Sequence[Tensor], slots: Tensor, accepted: Tensor | None
) -> None:
    """Fold every accepted token into its state; arguments as in the public operator."""
    taken, own = take(pool, slots)
    replay_eager.commit(log_decay, taken, own, accepted)
    _put_back(pool, slots, taken)


def take(pool: Sequence[Tensor], slots: Tensor) -> tuple[list[Tensor], Tensor]:
    """Copy slots into a ReplayPool's tensors; and where each row's slot is among them, or -1."""
    codes, *rings, row_scale = pool
    rows = (slots >= 0).nonzero().squeeze(1)
    at = slots[rows].long()
    own = torch.full_like(slots, -1)
    own[rows] = torch.arange(len(rows), device=slots.device, dtype=slots.dtype)
    state = dequantise_rows(codes[at], row_scale[at])
    return [state, *(ring[at].contiguous() for ring in rings)], own


def _put_back(pool: Sequence[Tensor], slots: Tensor, taken: Sequence[Tensor]) -> None:
    codes, *rings, row_scale = pool
    at = slots[slots >= 0].long()
    count = rings[2]
    # A fold ends with no more tokens in the ring than there were; a state that was not folded comes
    # back to its codes and scales, bit for bit.
    folded = taken[3][:, 0] <= count[at, 0]
    codes[at[folded]], row_scale[at[folded]] = quantise_rows(taken[0][folded])
    for ring, own in zip(rings, taken[1:], strict=True):
        ring[at] = own
