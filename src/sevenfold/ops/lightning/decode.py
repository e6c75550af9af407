"""Decoding over a pool of states: the public operator, its checks and its registration."""

import torch
from torch import Tensor

from sevenfold.ops.checks import choose_impl
from sevenfold.ops.lightning import decode_eager, decode_reference
from sevenfold.ops.lightning.decode_checks import (
    IMPLS,
    check_slots,
    check_state,
    check_tokens,
    default_impl,
)
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl


def lightning_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    *,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run one token of each sequence, its state updated in place in a pool.

        pool[slot] = exp(log_decay_h) * pool[slot] + k v^T        o = scale * q^T pool[slot]

    Nothing here waits for a device (impl "triton"), so that a CUDA graph can hold it. It takes no
    gradient.

    Args:
        q, k: [B, H, K], bf16, fp16, fp32, or fp64 for verification.
        v: [B, H, V], dtype of q.
        log_decay: [H] fp32, <= 0, natural log of the decay of one token; its sign is not checked.
        pool: [S, H, K, V] fp32 (fp64 with fp64 inputs), contiguous within a slot, whose slots may
            lie apart; changed in place.
        slots: [B] int32 or int64, each sequence's state in the pool, no two alike, less than S, not
            checked; -1 skips a row: its output is zero, and no state is touched.
        scale: multiplies the output; MiniMax uses 1.
        impl: "reference", "eager" or "triton"; None takes triton on a CUDA device in bf16, fp16 or
            fp32 with K, V <= 256, else eager. A named one never falls back.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError: a shape or device breaks the rules above; the message names both.
        TypeError: a dtype breaks them.
        UnsupportedError: the implementation cannot serve the arguments.

    Source: arXiv 2501.08313 (MiniMax-01), section 2.2.
    """
    check_tokens(q, k, v, log_decay, "BH")
    check_state("pool", pool, q, (*q.shape[1:], v.shape[-1]))
    check_slots(slots, len(q), q.device)
    chosen = choose_impl("lightning_attention_decode", impl, default_impl(q, v.shape[-1]), IMPLS)
    return _decode(q, k, v, log_decay, pool, slots, scale, str(chosen))


@torch.library.custom_op("sevenfold::lightning_decode", mutates_args=("pool",))
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    with full_precision(q.device):
        match impl:
            case Impl.REFERENCE:
                run = decode_reference.decode
            case Impl.EAGER:
                run = decode_eager.decode
            case _:
                from sevenfold.ops.lightning import triton_decode

                run = triton_decode.decode
        return run(q, k, v, log_decay, pool, slots, scale)


@_decode.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    return v.new_empty(v.shape)
