"""Argument checks and the default that decoding, replay and verification share."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape
from sevenfold.ops.types import Impl

IMPLS = (Impl.REFERENCE, Impl.EAGER, Impl.TRITON)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDEST = 256


def default_impl(q: Tensor, V: int) -> Impl:
    """Return what serves q by default.

    Triton on a CUDA device in bf16, fp16 or fp32 with heads of at most 256, else eager.
    """
    on_gpu = q.device.type == "cuda" and q.dtype != torch.float64
    return Impl.TRITON if on_gpu and max(q.shape[-1], V) <= _WIDEST else Impl.EAGER


def check_tokens(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, letters: str) -> None:
    """Raise unless q, k [*letters, K], v [*letters, V] and log_decay [H] fit together."""
    if q.dim() != len(letters) + 1:
        raise ValueError(f"q must have shape [{', '.join(letters)}, K], got {list(q.shape)}")
    check_dtype("q", q, _DTYPES)
    check_shape("k", k, q.shape, f"[{', '.join(letters)}, K]")
    if v.dim() != q.dim():
        raise ValueError(f"v must have shape [{', '.join(letters)}, V], got {list(v.shape)}")
    check_shape("v", v, (*q.shape[:-1], v.shape[-1]), f"[{', '.join(letters)}, V]")
    check_log_decay(log_decay, q.shape[-2])
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, (q.dtype,))
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay)):
        check_device(name, x, q.device)


def check_log_decay(log_decay: Tensor, H: int) -> None:
    """Raise unless log_decay is [H] fp32."""
    check_shape("log_decay", log_decay, (H,), "[H]")
    check_dtype("log_decay", log_decay, (torch.float32,))


def check_state(name: str, state: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a pool of states is [S, *shape] in slots, fp32 (fp64 with fp64 tokens)."""
    if state.dim() != 4:
        raise ValueError(f"{name} must have shape [S, H, K, V], got {list(state.shape)}")
    check_shape(name, state, (state.shape[0], *shape), "[S, H, K, V]")
    check_dtype(name, state, (torch.promote_types(like.dtype, torch.float32),))
    check_device(name, state, like.device)
    check_slotted(name, state)


def check_slotted(name: str, pool: Tensor) -> None:
    """Raise ValueError unless each slot pool[i] has no gaps and no slots overlap.

    Slots may lie apart: an arena hands out views in which other layers' states lie between them.
    """
    if pool.is_contiguous():
        return
    if not pool[0].is_contiguous() or pool.stride(0) < pool[0].numel():
        raise ValueError(
            f"{name} must be contiguous within a slot and its slots must not overlap, got shape "
            f"{list(pool.shape)} with strides {list(pool.stride())}"
        )


def check_slots(slots: Tensor, B: int, device: torch.device) -> None:
    """Raise unless slots is [B] int32 or int64 on the device."""
    check_shape("slots", slots, (B,), "[B]")
    check_dtype("slots", slots, (torch.int32, torch.int64))
    check_device("slots", slots, device)
