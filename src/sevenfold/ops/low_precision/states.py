"""States in fewer bits, some heads of a pool: the public operators that write and read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.low_precision import states_eager
from sevenfold.ops.low_precision.noise import Noise
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.TRITON)
WIDEST = 256  # head that the kernels serve


@dataclass(frozen=True)
class EncodedHeads:
    """Some heads of the states in a pool, in one format.

    codes: [S, h, K, V] fp32 or bf16, fp16 with a power of two a head, int8 with a scale a row.
    scale: [S, h] fp32 beside fp16, [S, h, K] fp32 beside int8; None beside fp32 and bf16.
    heads: [h] int64, which of the H heads; None is all, in their order.

    Each tensor is contiguous within a slot; slots may lie apart.
    """

    codes: Tensor
    scale: Tensor | None = None
    heads: Tensor | None = None


def default_states_impl(states: Tensor) -> Impl:
    """Return what both take: triton on a GPU with heads of at most 256, else eager."""
    fits = max(states.shape[-2:]) <= WIDEST
    return Impl.TRITON if states.device.type == "cuda" and fits else Impl.EAGER


def encode_states(
    states: Tensor,
    slots: Tensor,
    held: EncodedHeads,
    into: Tensor,
    *,
    noise: Noise | None = None,
    impl: Impl | str | None = None,
) -> None:
    """Round states of a pool into slots of another, the heads that `held` has.

        held[into_n] = states[slots_n], as to_scaled_fp16, quantise_rows, or the dtype itself

    One pass over the states (two for fp16, whose scale is the whole head's); nothing waits for a
    device, and the bits are the same in every implementation.

    Args:
        states: [S, H, K, V] fp32; slots may lie apart.
        slots: [N] int64, where they are; not checked.
        held: what is written in place.
        into: [N] int64, slots of held, no two alike; not checked.
        noise: of the N sequences: fp16 is rounded stochastically; None rounds to nearest.
        impl: "eager" or "triton" (a GPU, heads of at most 256); None takes default_states_impl. A
            named one never falls back.

    Raises:
        ValueError, TypeError: a shape, dtype or device breaks the rules above.
        UnsupportedError: triton is asked for where it cannot run, or there is no implementation of
            that name.
    """
    _check(states, slots, held, into)
    run = choose_impl("encode_states", impl, default_states_impl(states), _IMPLS)
    key, position, layer = (None, None, 0) if noise is None else _noise_of(noise, len(slots))
    rest = (held.codes, held.scale, held.heads, into, key, position, layer)
    _encode(states, slots, *rest, str(run))


def decode_states(
    held: EncodedHeads,
    slots: Tensor,
    states: Tensor,
    into: Tensor,
    *,
    impl: Impl | str | None = None,
) -> None:
    """Write states that are held in fewer bits into a pool in fp32, the heads that `held` has.

        states[into_n] = held[slots_n], exactly

    Args:
        held: what is read.
        slots: [N] int64, slots of held; not checked.
        states: [S, H, K, V] fp32, changed in place; slots may lie apart.
        into: [N] int64, slots of states, no two alike; not checked.
        impl: as encode_states.

    Raises:
        ValueError, TypeError, UnsupportedError: as encode_states.
    """
    _check(states, into, held, slots)
    run = choose_impl("decode_states", impl, default_states_impl(states), _IMPLS)
    _decode(held.codes, held.scale, held.heads, slots, states, into, str(run))


def _noise_of(noise: Noise, N: int) -> tuple[Tensor, Tensor, int]:
    check_shape("noise.key", noise.key, (N,), "[N]")
    check_shape("noise.position", noise.position, (N,), "[N]")
    return noise.key, noise.position, noise.layer


def _check(states: Tensor, slots: Tensor, held: EncodedHeads, others: Tensor) -> None:
    S, h, K, V = held.codes.shape
    heads = states.shape[1] if held.heads is not None else h
    check_shape("states", states, (len(states), heads, K, V), "[S, H, K, V]")
    check_dtype("states", states, (torch.float32,))
    check_shape("slots", slots, (len(slots),), "[N]")
    check_shape("into", others, (len(slots),), "[N]")
    scales = {torch.float16: (S, h), torch.int8: (S, h, K), torch.float32: None}
    scales[torch.bfloat16] = None
    check_dtype("held.codes", held.codes, scales)
    wanted = scales[held.codes.dtype]
    if held.scale is not None and wanted is not None:
        check_shape("held.scale", held.scale, wanted, "[S, h] or [S, h, K]")
        check_dtype("held.scale", held.scale, (torch.float32,))
    elif (held.scale is None) != (wanted is None):
        got = None if held.scale is None else list(held.scale.shape)
        raise ValueError(
            f"held.scale must have shape {wanted} beside {held.codes.dtype}, got {got}"
        )
    for name, x in (("slots", slots), ("into", others), ("held.codes", held.codes)):
        check_device(name, x, states.device)


@torch.library.custom_op("sevenfold::encode_states", mutates_args=("codes", "scale"))
def _encode(
    states: Tensor,
    slots: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    heads: Tensor | None,
    into: Tensor,
    key: Tensor | None,
    position: Tensor | None,
    layer: int,
    impl: str,
) -> None:
    if impl == Impl.EAGER:
        run = states_eager.encode
    else:
        from sevenfold.ops.low_precision import triton_states

        run = triton_states.encode
    run(states, slots, codes, scale, heads, into, key, position, layer)


@torch.library.custom_op("sevenfold::decode_states", mutates_args=("states",))
def _decode(
    codes: Tensor,
    scale: Tensor | None,
    heads: Tensor | None,
    slots: Tensor,
    states: Tensor,
    into: Tensor,
    impl: str,
) -> None:
    if impl == Impl.EAGER:
        run = states_eager.decode
    else:
        from sevenfold.ops.low_precision import triton_states

        run = triton_states.decode
    run(codes, scale, heads, slots, states, into)


@_encode.register_fake
@_decode.register_fake
def _fake(*arguments: object) -> None:
    return None
