"""Softmax attention: the public operators, their checks and the choice of implementation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.attention import eager, flash, reference
from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.numba_rules import suits_numba
from sevenfold.ops.types import Impl

_IMPLS = (Impl.REFERENCE, Impl.EAGER, Impl.NUMBA)
_WHOLE_IMPLS = (*_IMPLS, Impl.FLASH)
_NUMBA_WIDTH = 32  # columns of a tile of values, and of the keys' gradient
_LONG_TOKENS = 512  # from here on the compiled loops repay their start


def default_attention_impl(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Impl:
    """Return what attention and attention_cached take.

    numba for fp32 on a CPU from 512 tokens on; flash for sequences packed into a row in bf16 or
    fp16 on a GPU (attention alone); else eager.
    """
    cached = _default_cached_impl(q, k, v, lengths)
    if cached is Impl.NUMBA:
        return cached
    whole_rows = tuple(lengths) == (q.shape[1],) * q.shape[0]
    packs = not whole_rows and max(lengths, default=0) > 0
    return Impl.FLASH if packs and flash.refusal(q, v) is None else Impl.EAGER


def _default_cached_impl(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Impl:
    long = max(lengths, default=0) >= _LONG_TOKENS
    return Impl.NUMBA if long and _numba_refusal(q, k, v) is None else Impl.EAGER


def _numba_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why numba cannot compute this, if it cannot."""
    if not suits_numba(q, k, v):
        return f"q must be fp32 on a CPU, not empty, for impl numba, got {q.dtype} on {q.device}"
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    for name, x in (("V", v), ("D", q))[: 1 + trains]:
        if x.shape[-1] % _NUMBA_WIDTH:
            got = x.shape[-1]
            return f"{name} must be a multiple of {_NUMBA_WIDTH} for impl numba, got {got}"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """Causal softmax attention over whole sequences, each over its own tokens only.

        o_i = sum_j softmax_j(scale * q_i^T k_j) v_j    over j <= i, and i - j < window

    Args:
        q: [B, T, H, D]; B * T tokens hold N sequences one after another.
        k: [B, T, G, D], dtype of q. G divides H: query head h reads key head h * G // H.
        v: [B, T, G, V], dtype of q.
        lengths: tokens of each sequence; they sum to B * T.
        scale: multiplies the scores.
        window: tokens that a query sees, itself included, at least 1; None is all before it.
        impl: "reference", "eager", "numba" (fp32 on a CPU) or "flash" (all sequences in one call,
            bf16 or fp16 on a GPU); None takes default_attention_impl. A named one never falls back.

    Returns:
        [B, T, H, V] in v's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or value breaks the rules above.
        UnsupportedError: the operator has no implementation of that name, or numba or flash is
            asked for where it cannot compute.
    """
    B, T = q.shape[:2]
    _check(q, k, v, lengths, window)
    check_shape("k", k, (B, T, *k.shape[2:]), "[B, T, G, D]")
    chosen = _choose("attention", impl, q, k, v, lengths)
    if chosen is Impl.FLASH:
        if refusal := flash.refusal(q, v):
            raise UnsupportedError(refusal)
        queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        o = flash.packed(queries, keys, values, lengths, scale=scale, window=window)
        return o.view(q.shape)
    run = _one_sequence(chosen)
    if run is eager.one_sequence and tuple(lengths) == (T,) * B and T:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return eager.causal(q, k, v, scale=scale, window=window).transpose(1, 2)
    split = zip(*(x.flatten(0, 1).split(list(lengths)) for x in (q, k, v)), strict=True)
    parts = [run(*sequence, scale=scale, window=window) for sequence in split if len(sequence[0])]
    return _joined(parts, q, v)


def attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """Causal softmax attention of new tokens over a cache that already holds their keys.

    Args:
        q: [B, T, H, D]; B * T tokens hold the new tokens of N sequences one after another.
        k: [N, S, G, D], dtype of q; sequence n fills its first key_lengths[n] places.
        v: [N, S, G, V], dtype of q.
        lengths: new tokens of each sequence; they sum to B * T.
        key_lengths: keys of each sequence, the new tokens' included as its last ones.
        scale, window: as in attention.
        impl: "reference", "eager" or "numba" (fp32 on a CPU); None takes
            default_attention_impl. A named one never falls back.

    Returns:
        [B, T, H, V] in v's dtype.

    Raises:
        ValueError, TypeError, UnsupportedError: as attention.
    """
    _check(q, k, v, lengths, window)
    N, S = k.shape[:2]
    if not len(lengths) == len(key_lengths) == N:
        raise ValueError(f"key_lengths must be as many as lengths and N = {N}, got {key_lengths}")
    for length, keys in zip(lengths, key_lengths, strict=True):
        if not length <= keys <= S:
            raise ValueError(f"key_lengths must lie in {length} (new) to {S} (places), got {keys}")
    run = _one_sequence(_choose("attention_cached", impl, q, k, v, lengths))
    if run is eager.one_sequence and len(set(lengths)) == 1 and lengths[0]:
        batched = q.reshape(N, lengths[0], *q.shape[2:])
        if len(set(key_lengths)) == 1 or lengths[0] == 1:
            o = eager.cached(batched, k, v, key_lengths, scale=scale, window=window)
            return o.reshape(*q.shape[:3], -1)
    parts = [
        run(new, k[n, : key_lengths[n]], v[n, : key_lengths[n]], scale=scale, window=window)
        for n, new in enumerate(q.flatten(0, 1).split(list(lengths)))
        if len(new)
    ]
    return _joined(parts, q, v)


def _choose(
    name: str, impl: Impl | str | None, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]
) -> Impl:
    default, known = default_attention_impl, _WHOLE_IMPLS
    if name == "attention_cached":
        default, known = _default_cached_impl, _IMPLS
    chosen = choose_impl(name, impl, default(q, k, v, lengths), known)
    if chosen is Impl.NUMBA and (refusal := _numba_refusal(q, k, v)):
        raise UnsupportedError(refusal)
    return chosen


def _one_sequence(impl: Impl) -> Callable[..., Tensor]:
    if impl is Impl.NUMBA:
        # numba takes half a second to import: only who needs it waits for it.
        from sevenfold.ops.attention import compiled

        return compiled.one_sequence
    return {Impl.REFERENCE: reference.one_sequence, Impl.EAGER: eager.one_sequence}[impl]


def _joined(parts: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    shape = (*q.shape[:3], v.shape[-1])
    return torch.cat(parts).view(shape) if parts else v.new_zeros(shape)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must have 4 dimensions, got {q.dim()} and {k.dim()}")
    H, D = q.shape[2:]
    check_shape("k", k, (*k.shape[:3], D), "[..., G, D]")
    check_shape("v", v, (*k.shape[:3], v.shape[-1]), "[..., G, V]")
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, (q.dtype,))
        check_device(name, x, q.device)
    if k.shape[2] < 1 or H % k.shape[2]:
        raise ValueError(f"k's heads must divide the {H} query heads, got {k.shape[2]}")
    if min(lengths, default=-1) < 0 or sum(lengths) != q.shape[0] * q.shape[1]:
        tokens = q.shape[0] * q.shape[1]
        raise ValueError(f"lengths must be >= 0 and sum to B * T = {tokens}, got {lengths}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
