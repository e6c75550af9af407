"""Decoding over a pool of states in fp16, rounded stochastically: the public operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.lightning import decode_fp16_eager
from sevenfold.ops.lightning.decode_checks import (
    check_slots,
    check_slotted,
    check_tokens,
    default_impl,
)
from sevenfold.ops.low_precision import Noise, ScaledFp16
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.TRITON)
_TOKEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lightning_attention_decode_fp16(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: ScaledFp16,
    slots: Tensor,
    noise: Noise,
    *,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run one token of each sequence, its state in fp16 updated in place in a pool.

        S = exp(log_decay_h) * codes * scale_h + k v^T        o = scale * q^T S
        codes, scale_h = to_scaled_fp16(S, noise_bits(noise))

    The output is that of the state before it is rounded. A sequence's noise is the same in any
    batch and any slot, and in every implementation. It takes no gradient.

    Args:
        q, k: [B, H, K], bf16, fp16 or fp32.
        v: [B, H, V], dtype of q.
        log_decay: [H] fp32, <= 0, natural log of the decay of one token; its sign is not checked.
        pool: codes [S, H, K, V] fp16 and scale [S, H] fp32, each contiguous within a slot; slots
            may lie apart; changed in place.
        slots: [B] int32 or int64, each sequence's state in the pool, no two alike, less than S, not
            checked; -1 skips a row: its output is zero, and no state is touched.
        noise: of the B sequences.
        scale: multiplies the output; MiniMax uses 1.
        impl: "eager" or "triton" (a CUDA device, K and V at most 256; waits for nothing, so that a
            graph can hold it); None takes triton where it can run, else eager. A named one never
            falls back.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError: a shape or device breaks the rules above; the message names both.
        TypeError: a dtype breaks them.
        UnsupportedError: the implementation cannot serve the arguments.

    Source: stochastic rounding of a sum that small terms enter, arXiv 1502.02551.
    """
    check_tokens(q, k, v, log_decay, "BH")
    check_dtype("q", q, _TOKEN_DTYPES)
    (B, H, K), V, S = q.shape, v.shape[-1], len(pool.codes)
    check_shape("pool.codes", pool.codes, (S, H, K, V), "[S, H, K, V]")
    check_shape("pool.scale", pool.scale, (S, H), "[S, H]")
    check_dtype("pool.codes", pool.codes, (torch.float16,))
    check_dtype("pool.scale", pool.scale, (torch.float32,))
    for name, x in (("pool.codes", pool.codes), ("pool.scale", pool.scale)):
        check_device(name, x, q.device)
        check_slotted(name, x)
    check_slots(slots, B, q.device)
    for name, x in (("noise.key", noise.key), ("noise.position", noise.position)):
        check_shape(name, x, (B,), "[B]")
        check_dtype(name, x, (torch.int64,))
        check_device(name, x, q.device)
    default = default_impl(q, V)
    chosen = choose_impl("lightning_attention_decode_fp16", impl, default, _IMPLS)
    bits = [noise.key, noise.position]
    tensors = [pool.codes, pool.scale]
    return _decode(q, k, v, log_decay, tensors, slots, bits, noise.layer, scale, str(chosen))


@torch.library.custom_op("sevenfold::lightning_decode_fp16", mutates_args=("pool",))
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    bits: Sequence[Tensor],
    layer: int,
    scale: float,
    impl: str,
) -> Tensor:
    noise = Noise(bits[0], bits[1], layer)
    with full_precision(q.device):
        if impl == Impl.EAGER:
            run = decode_fp16_eager.decode
        else:
            from sevenfold.ops.lightning import triton_decode_fp16

            run = triton_decode_fp16.decode
        return run(q, k, v, log_decay, ScaledFp16(*pool), slots, noise, scale)


@_decode.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    bits: Sequence[Tensor],
    layer: int,
    scale: float,
    impl: str,
) -> Tensor:
    return v.new_empty(v.shape)
