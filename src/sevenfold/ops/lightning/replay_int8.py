"""Decoding with states in int8: recent tokens stay exact in a ring, and a state is rounded rarely.

A state that is quantised at every token drowns in its own rounding (docs/low-precision.md). Here it
is quantised when the ring is folded into it, once in R tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.lightning import replay_int8_eager
from sevenfold.ops.lightning.decode_checks import (
    check_slots,
    check_slotted,
    check_tokens,
    default_impl,
)
from sevenfold.ops.lightning.replay import ReplayPool
from sevenfold.ops.lightning.verify import lightning_attention_commit
from sevenfold.ops.low_precision import EncodedHeads, encode_states
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

INT8_IMPLS = (Impl.EAGER, Impl.TRITON)
_TOKEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Int8ReplayPool:
    """States of one layer in int8, and the tokens that each of them still lacks, as ReplayPool's.

    Each tensor is contiguous within a slot; slots may lie apart.

    Attributes:
        codes: [S, H, K, V] int8.
        scale: [S, H, K] fp32, of each head and key channel.
        ring_k: [S, H, R, K], the tokens' dtype: bf16, fp16 or fp32.
        ring_v: [S, H, R, V].
        count: [S, H] int32, tokens in the ring, alike in all heads.
    """

    codes: Tensor
    scale: Tensor
    ring_k: Tensor
    ring_v: Tensor
    count: Tensor

    def tensors(self) -> list[Tensor]:
        """Return codes, ring_k, ring_v, count and scale, as the registered operators take them."""
        return [self.codes, self.ring_k, self.ring_v, self.count, self.scale]

    def read(self, slots: Tensor, log_decay: Tensor) -> Tensor:
        """Return the states after every token so far, [N, H, K, V] fp32; the pool is unchanged.

        Args:
            slots: [N] int64.
            log_decay: [H] fp32.
        """
        taken = self.gather(slots)
        lightning_attention_commit(log_decay, taken, _in_order(slots))
        return taken.state

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Quantise states [N, H, K, V] fp32 into slots [N], whose rings are empty from then on."""
        encode_states(states, _in_order(slots), EncodedHeads(self.codes, self.scale), slots)
        self.count[slots] = 0

    def gather(self, slots: Tensor) -> ReplayPool:
        """Return copies of slots [N] as a pool of their own, in fp32."""
        return ReplayPool(*replay_int8_eager.take(self.tensors(), slots)[0])


def _in_order(slots: Tensor) -> Tensor:
    return torch.arange(len(slots), device=slots.device)


def lightning_attention_replay_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: Int8ReplayPool,
    slots: Tensor,
    *,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Run one token of each sequence over states in int8.

        o = lightning_attention_replay over codes * scale and the ring
        where the ring was full: codes, scale = quantise_rows(the state that it was folded into)

    Between two folds the state is the same and the ring is exact, so what an output lacks is one
    rounding for each R tokens, each of at most half a step of its row.

    Args:
        q, k: [B, H, K], the dtype of the pool's rings.
        v: [B, H, V], dtype of q.
        log_decay: [H] fp32, <= 0.
        pool: changed in place.
        slots: [B] int32 or int64, each sequence's slot, no two alike, less than S, not checked; -1
            skips a row: its output is zero, and no slot is touched.
        scale: multiplies the output.
        impl: "eager" or "triton" (a CUDA device, K and V at most 256; waits for nothing); None
            takes triton where it can run, else eager. A named one never falls back.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention_replay.
    """
    check_tokens(q, k, v, log_decay, "BH")
    check_int8_pool(pool, q, v)
    check_slots(slots, len(q), q.device)
    default = default_impl(q, v.shape[-1])
    chosen = choose_impl("lightning_attention_replay_int8", impl, default, INT8_IMPLS)
    return _replay(q, k, v, log_decay, pool.tensors(), slots, scale, str(chosen))


def check_int8_pool(pool: Int8ReplayPool, q: Tensor, v: Tensor) -> None:
    """Raise unless the pool serves q [..., H, K] and v [..., H, V]."""
    (H, K), V = q.shape[-2:], v.shape[-1]
    S, R = len(pool.codes), pool.ring_k.shape[2] if pool.ring_k.dim() == 4 else 0
    shapes = {
        "codes": ((S, H, K, V), "[S, H, K, V]", (torch.int8,)),
        "scale": ((S, H, K), "[S, H, K]", (torch.float32,)),
        "ring_k": ((S, H, R, K), "[S, H, R, K]", (q.dtype,)),
        "ring_v": ((S, H, R, V), "[S, H, R, V]", (q.dtype,)),
        "count": ((S, H), "[S, H]", (torch.int32,)),
    }
    check_dtype("q", q, _TOKEN_DTYPES)
    for name, (shape, letters, dtypes) in shapes.items():
        x = getattr(pool, name)
        check_shape(f"pool.{name}", x, shape, letters)
        check_dtype(f"pool.{name}", x, dtypes)
        check_device(f"pool.{name}", x, q.device)
        check_slotted(f"pool.{name}", x)


@torch.library.custom_op("sevenfold::lightning_replay_int8", mutates_args=("pool",))
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
        if impl == Impl.EAGER:
            run = replay_int8_eager.replay
        else:
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
