"""Verification of draft tokens over states in int8: the public operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, choose_impl
from sevenfold.ops.lightning import replay_int8_eager
from sevenfold.ops.lightning.decode_checks import (
    check_log_decay,
    check_slots,
    check_tokens,
    default_impl,
)
from sevenfold.ops.lightning.replay_int8 import INT8_IMPLS, Int8ReplayPool, check_int8_pool
from sevenfold.ops.lightning.verify import check_accepted, check_draft
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl


def lightning_attention_verify_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Int8ReplayPool,
    slots: Tensor,
    *,
    accepted: Tensor | None = None,
    ancestors: Tensor | None = None,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run a draft of T tokens of each sequence over states in int8.

        o = lightning_attention_verify over codes * scale and the ring
        where the ring was short: codes, scale = quantise_rows(the state that it was folded into)

    A draft that is rejected changes no state: what is folded was accepted before.

    Args:
        q, k: [B, T, H, K] with 1 <= T <= 16, the dtype of the pool's rings.
        v: [B, T, H, V], dtype of q.
        log_decay: [H] fp32, <= 0.
        pool: R >= T; changed in place.
        slots: as lightning_attention_replay_int8.
        accepted: [B, A] int32, ancestors: [B, T, T] bool, as lightning_attention_verify.
        scale: multiplies the output.
        impl: as lightning_attention_replay_int8.

    Returns:
        o [B, T, H, V] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_verify.
    """
    check_tokens(q, k, v, log_decay, "BTH")
    check_int8_pool(pool, q, v)
    check_slots(slots, len(q), q.device)
    check_draft(q, pool.ring_k.shape[2], accepted, ancestors)
    default = default_impl(q, v.shape[-1])
    chosen = choose_impl("lightning_attention_verify_int8", impl, default, INT8_IMPLS)
    tensors = pool.tensors()
    return _verify(q, k, v, log_decay, tensors, slots, accepted, ancestors, scale, str(chosen))


def lightning_attention_commit_int8(
    log_decay: Tensor,
    pool: Int8ReplayPool,
    slots: Tensor,
    *,
    accepted: Tensor | None = None,
    impl: Impl | str | None = None,
) -> None:
    """Bring states in int8 up to date: fold all that is pending and accepted, and round once.

    Args:
        log_decay: [H] fp32, <= 0.
        pool: changed in place; afterwards count is zero.
        slots: as lightning_attention_replay_int8.
        accepted: [B, A] int32 as lightning_attention_verify; None accepts none.
        impl: as lightning_attention_replay_int8.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_commit.
    """
    check_int8_pool(pool, pool.ring_k.transpose(1, 2), pool.ring_v.transpose(1, 2))
    check_log_decay(log_decay, pool.codes.shape[1])
    check_device("log_decay", log_decay, pool.codes.device)
    check_slots(slots, len(slots), pool.codes.device)
    check_accepted(accepted, len(slots), pool.codes.device)
    default = default_impl(pool.ring_k, pool.ring_v.shape[-1])
    chosen = choose_impl("lightning_attention_commit_int8", impl, default, INT8_IMPLS)
    _commit(log_decay, pool.tensors(), slots, accepted, str(chosen))


@torch.library.custom_op("sevenfold::lightning_verify_int8", mutates_args=("pool",))
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
        if impl == Impl.EAGER:
            run = replay_int8_eager.verify
        else:
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


@torch.library.custom_op("sevenfold::lightning_commit_int8", mutates_args=("pool",))
def _commit(
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    accepted: Tensor | None,
    impl: str,
) -> None:
    if impl == Impl.EAGER:
        run = replay_int8_eager.commit
    else:
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
