"""Verification of draft tokens: the public operators, their checks and their registration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.lightning import replay_eager, replay_reference
from sevenfold.ops.lightning.decode_checks import (
    IMPLS,
    check_log_decay,
    check_slots,
    check_tokens,
    default_impl,
)
from sevenfold.ops.lightning.replay import ReplayPool, check_pool
from sevenfold.ops.numba_rules import check_numba, suits_numba
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

MAX_DRAFT_TOKENS = 16


def lightning_attention_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: ReplayPool,
    slots: Tensor,
    *,
    accepted: Tensor | None = None,
    ancestors: Tensor | None = None,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run a draft of T tokens of each sequence, a chain or a tree, without a state for each.

    The tokens accepted of the slot's previous draft join those pending in its ring. With S the
    state and P tokens pending then, and d_t the number of t's ancestors in the draft:

        o_t = scale * (a^(P + d_t + 1) S^T q_t + sum_{i < P} a^(P + d_t - i) (k_i . q_t) v_i
                       + sum_{s ancestor of t, or t} a^(d_t - d_s) (k_s . q_t) v_s)

    The draft's keys and values go into the ring behind them, and count only if the next call on the
    slot accepts them. Where the ring is too short, what is pending is folded into the state first.
    At most one state is read and one written. A CUDA graph can hold the call (impl "triton"). It
    takes no gradient.

    Args:
        q, k: [B, T, H, K] with 1 <= T <= 16, bf16, fp16, fp32, or fp64 for verification.
        v: [B, T, H, V], dtype of q.
        log_decay: [H] fp32, <= 0, natural log of the decay of one token; its sign is not checked.
        pool: S slots of H heads of K, V, in the dtype of q, R >= T; changed in place.
        slots: [B] int32 or int64, each sequence's slot, no two alike, less than S, not checked; -1
            skips a row: its outputs are zero, and no slot is touched.
        accepted: [B, A] int32, for each sequence the indices into its slot's previous draft of the
            tokens accepted, from the first to the last, then -1; None accepts none. The same call
            after a rejected draft takes a row of -1.
        ancestors: [B, T, T] bool, ancestors[b, t, s] says that s is t or an ancestor of t; an
            ancestor stands before its descendants. None is a chain: all s <= t.
        scale: multiplies the output; MiniMax uses 1.
        impl: "reference", "eager", "numba" (fp32 on a CPU) or "triton"; None takes Triton where
            lightning_attention_decode does, then numba where it can, else eager. A named one never
            falls back.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_decode.

    Source: KVBuffer (arXiv 2605.19049) and STree (NeurIPS 2025), for a decay that is known.
    """
    check_tokens(q, k, v, log_decay, "BTH")
    check_pool(pool, q, v)
    check_slots(slots, len(q), q.device)
    check_draft(q, pool.ring_k.shape[2], accepted, ancestors)
    chosen = _choose("lightning_attention_verify", impl, q, v)
    pools = pool.tensors()
    return _verify(q, k, v, log_decay, pools, slots, accepted, ancestors, scale, str(chosen))


def lightning_attention_commit(
    log_decay: Tensor,
    pool: ReplayPool,
    slots: Tensor,
    *,
    accepted: Tensor | None = None,
    impl: Impl | str | None = None,
) -> None:
    """Bring states up to date: fold all that is pending, and the accepted tokens of the last draft.

        S = a^P S + sum_{i < P} a^(P - 1 - i) k_i v_i^T        count = 0

    Afterwards `pool.state[slot]` is the state after the sequence's last token.

    Args:
        log_decay: [H] fp32, <= 0, natural log of the decay of one token; its sign is not checked.
        pool: changed in place.
        slots: [B] int32 or int64, no two alike, less than S, not checked; -1 skips a row.
        accepted: [B, A] int32 as lightning_attention_verify; None accepts none.
        impl: as lightning_attention_verify.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_decode.
    """
    check_pool(pool, pool.ring_k.transpose(1, 2), pool.ring_v.transpose(1, 2))
    check_log_decay(log_decay, pool.state.shape[1])
    check_device("log_decay", log_decay, pool.state.device)
    check_slots(slots, len(slots), pool.state.device)
    check_accepted(accepted, len(slots), pool.state.device)
    chosen = _choose("lightning_attention_commit", impl, pool.ring_k, pool.ring_v)
    _commit(log_decay, pool.tensors(), slots, accepted, str(chosen))


def _choose(name: str, impl: Impl | str | None, k: Tensor, v: Tensor) -> Impl:
    default = default_impl(k, v.shape[-1])
    if default is Impl.EAGER and suits_numba(k, v):
        default = Impl.NUMBA
    chosen = choose_impl(name, impl, default, (*IMPLS, Impl.NUMBA))
    if chosen is Impl.NUMBA:
        check_numba("k", k)
    return chosen


def check_draft(
    q: Tensor, ring_tokens: int, accepted: Tensor | None, ancestors: Tensor | None
) -> None:
    """Raise unless a draft q [B, T, H, K] fits a ring, and what is said of it fits the draft."""
    B, T = q.shape[:2]
    most = min(MAX_DRAFT_TOKENS, ring_tokens)
    if not 1 <= T <= most:
        raise ValueError(f"T must lie in 1 to {most}, got {T}")
    check_accepted(accepted, B, q.device)
    if ancestors is not None:
        check_shape("ancestors", ancestors, (B, T, T), "[B, T, T]")
        check_dtype("ancestors", ancestors, (torch.bool,))
        check_device("ancestors", ancestors, q.device)


def check_accepted(accepted: Tensor | None, B: int, device: torch.device) -> None:
    """Raise unless accepted is [B, A] int32 on the device, or None."""
    if accepted is None:
        return
    if accepted.dim() != 2:
        raise ValueError(f"accepted must have shape [B, A], got {list(accepted.shape)}")
    check_shape("accepted", accepted, (B, accepted.shape[1]), "[B, A]")
    check_dtype("accepted", accepted, (torch.int32,))
    check_device("accepted", accepted, device)


@torch.library.custom_op("sevenfold::lightning_verify", mutates_args=("pool",))
def _verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
    impl: str,
) -> Tensor:
    with full_precision(q.device):
        match impl:
            case Impl.REFERENCE:
                run = replay_reference.verify
            case Impl.EAGER:
                run = replay_eager.verify
            case Impl.NUMBA:
                from sevenfold.ops.lightning import compiled_replay

                run = compiled_replay.verify
            case _:
                from sevenfold.ops.lightning import triton_verify

                run = triton_verify.verify
        return run(q, k, v, log_decay, pool, slots, accepted, ancestors, scale)


@_verify.register_fake
def _fake_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
    impl: str,
) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("sevenfold::lightning_commit", mutates_args=("pool",))
def _commit(
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    impl: str,
) -> None:
    match impl:
        case Impl.REFERENCE:
            run = replay_reference.commit
        case Impl.EAGER:
            run = replay_eager.commit
        case Impl.NUMBA:
            from sevenfold.ops.lightning import compiled_replay

            run = compiled_replay.commit
        case _:
            from sevenfold.ops.lightning import triton_verify

            run = triton_verify.commit
    run(log_decay, pool, slots, accepted)


@_commit.register_fake
def _fake_commit(
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    impl: str,
) -> None:
    return None
