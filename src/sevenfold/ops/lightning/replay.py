"""Decoding with recent keys and values beside the state: the pool and the public operator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.lightning import replay_eager, replay_reference
from sevenfold.ops.lightning.decode_checks import (
    IMPLS,
    check_slots,
    check_slotted,
    check_state,
    check_tokens,
    default_impl,
)
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl


@dataclass(frozen=True)
class ReplayPool:
    """States of one layer, and the tokens that each of them still lacks.

    A slot's sequence is its state and then the first `count` tokens of its ring. Tokens behind
    them are a draft: they count once they are accepted, and are overwritten otherwise. To begin a
    sequence, write its state and set its count to zero; `lightning_attention_commit` brings a state
    up to date. Prepare it once: what it holds changes in place. Each tensor is contiguous within a
    slot; slots may lie apart.

    Attributes:
        state: [S, H, K, V] fp32 (fp64 with fp64 tokens).
        ring_k: [S, H, R, K], the tokens' dtype.
        ring_v: [S, H, R, V].
        count: [S, H] int32, alike in all heads: a program that owns a head owns its cursor.
    """

    state: Tensor
    ring_k: Tensor
    ring_v: Tensor
    count: Tensor

    @classmethod
    def zeros(
        cls,
        num_slots: int,
        num_heads: int,
        widths: tuple[int, int],
        *,
        ring_tokens: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "ReplayPool":
        """Allocate a pool of empty sequences.

            bytes per slot and head = 4 K V + ring_tokens * (K + V) * bytes of dtype + 4

        Args:
            num_slots: S.
            num_heads: H.
            widths: K and V.
            ring_tokens: R, at least 1. A state is written once in about R tokens and the ring is
                read at every one, so that bytes are fewest near sqrt(4 K V / (K + V)) for 2-byte
                tokens: 16 for widths of 128. A draft needs R >= T.
            dtype: of the tokens.
            device: where it lies.

        Returns:
            A pool whose states and counts are zero.

        Raises:
            ValueError: ring_tokens is less than 1.
        """
        if ring_tokens < 1:
            raise ValueError(f"ring_tokens must be at least 1, got {ring_tokens}")
        K, V = widths
        heads = (num_slots, num_heads)
        return cls(
            torch.zeros(
                *heads, K, V, dtype=torch.promote_types(dtype, torch.float32), device=device
            ),
            torch.zeros(*heads, ring_tokens, K, dtype=dtype, device=device),
            torch.zeros(*heads, ring_tokens, V, dtype=dtype, device=device),
            torch.zeros(heads, dtype=torch.int32, device=device),
        )

    def tensors(self) -> list[Tensor]:
        """Return state, ring_k, ring_v and count, as the registered operators take them."""
        return [self.state, self.ring_k, self.ring_v, self.count]


def lightning_attention_replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: ReplayPool,
    slots: Tensor,
    *,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run one token of each sequence; states are read, and written once in R tokens.

    With S the state, P tokens pending in the ring, and this token the one of index P:

        o = scale * (a^(P + 1) S^T q + sum_{i <= P} a^(P - i) (k_i . q) v_i)    a = exp(log_decay_h)

    The token goes into the ring. Where that is full, what is pending is folded into the state
    first, S = a^P S + sum_{i < P} a^(P - 1 - i) k_i v_i^T. The device decides it slot by slot, so
    that a CUDA graph can hold the call (impl "triton"). It takes no gradient.

    Args:
        q, k: [B, H, K], bf16, fp16, fp32, or fp64 for verification.
        v: [B, H, V], dtype of q.
        log_decay: [H] fp32, <= 0, natural log of the decay of one token; its sign is not checked.
        pool: S slots of H heads of K, V, in the dtype of q; changed in place. A draft that was not
            accepted is dropped.
        slots: [B] int32 or int64, each sequence's slot, no two alike, less than S, not checked; -1
            skips a row: its output is zero, and no slot is touched.
        scale: multiplies the output; MiniMax uses 1.
        impl: as lightning_attention_decode.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_decode.

    Source: the idea of ReplaySSM (Dao AI Lab 2026) and KVBuffer (arXiv 2605.19049), for a decay
    that is known.
    """
    check_tokens(q, k, v, log_decay, "BH")
    check_pool(pool, q, v)
    check_slots(slots, len(q), q.device)
    chosen = choose_impl("lightning_attention_replay", impl, default_impl(q, v.shape[-1]), IMPLS)
    return _replay(q, k, v, log_decay, pool.tensors(), slots, scale, str(chosen))


def check_pool(pool: ReplayPool, q: Tensor, v: Tensor) -> None:
    """Raise unless the pool serves q [..., H, K] and v [..., H, V]."""
    H, K = q.shape[-2:]
    V = v.shape[-1]
    check_state("pool.state", pool.state, q, (H, K, V))
    S, R = len(pool.state), pool.ring_k.shape[2] if pool.ring_k.dim() == 4 else 0
    check_shape("pool.ring_k", pool.ring_k, (S, H, R, K), "[S, H, R, K]")
    check_shape("pool.ring_v", pool.ring_v, (S, H, R, V), "[S, H, R, V]")
    check_shape("pool.count", pool.count, (S, H), "[S, H]")
    check_dtype("pool.count", pool.count, (torch.int32,))
    for name, ring in (("pool.ring_k", pool.ring_k), ("pool.ring_v", pool.ring_v)):
        check_dtype(name, ring, (q.dtype,))
    for name, x in zip(("ring_k", "ring_v", "count"), pool.tensors()[1:], strict=True):
        check_device(f"pool.{name}", x, q.device)
        check_slotted(f"pool.{name}", x)


@torch.library.custom_op("sevenfold::lightning_replay", mutates_args=("pool",))
def _replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    with full_precision(q.device):
        match impl:
            case Impl.REFERENCE:
                run = replay_reference.replay
            case Impl.EAGER:
                run = replay_eager.replay
            case _:
                from sevenfold.ops.lightning import triton_decode_replay

                run = triton_decode_replay.replay
        return run(q, k, v, log_decay, pool, slots, scale)


@_replay.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Sequence[Tensor],
    slots: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    return v.new_empty(v.shape)
