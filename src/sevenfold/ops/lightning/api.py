"""Lightning attention: the public operator, its checks and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.lightning import eager, reference, triton_op
from sevenfold.ops.lightning.decode_checks import default_impl as default_decode_impl
from sevenfold.ops.lightning.lengths import read_lengths
from sevenfold.ops.lightning.snapshots import (
    Snapshots,
    check_snapshots,
    check_stops,
    forward_by_parts,
)
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl, OpResult

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
IMPLS = (Impl.REFERENCE, Impl.EAGER, Impl.NUMBA, Impl.TRITON)
_NUMBA_WIDTH = 32  # whole tiles
_STEP_IMPLS = (Impl.REFERENCE, Impl.EAGER, Impl.TRITON)
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl | str | None = None,
) -> OpResult:
    """Linear attention with a fixed decay per head, over whole sequences.

        S_t = exp(log_decay_h) * S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

    The current token counts with weight 1. A run that is split, and hands its state on, equals the
    whole run; packed sequences equal the same sequences run one by one.

    Args:
        q, k: [B, T, H, K], bf16, fp16, fp32, or fp64 for verification.
        v: [B, T, H, V], dtype of q.
        log_decay: [H] fp32, <= 0, natural log of the decay of one token (minus the slope); fixed,
            so it takes no gradient.
        scale: multiplies the output; MiniMax uses 1.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs); zeros when None. N is B, or the
            number of packed sequences. Takes a gradient.
        return_final_state: return the state after each sequence's last token.
        cu_seqlens: [N + 1] int32, cumulative lengths of packed sequences, 0 first, T last, never
            falling; needs B == 1. Read on the host: keep it on the CPU to spare a synchronisation.
        impl: "reference", "eager", "numba" (fp32 on a CPU) or "triton"; None takes default_impl. A
            named one never falls back.

    Returns:
        OpResult(o [B, T, H, V] in v's dtype, final_state [N, H, K, V] fp32 or None).

    Raises:
        ValueError: a shape, device or value breaks the rules above; the message names both.
        TypeError: a dtype breaks them.
        UnsupportedError: the operator has no implementation of that name, or the named one does not
            serve such a device, dtype or width.

    Source: arXiv 2501.08313 (MiniMax-01), 2401.04658 (Lightning Attention-2).
    """
    check(q, k, v, log_decay, initial_state, cu_seqlens)
    default = default_impl(q.device, q.dtype, q.shape[-1], v.shape[-1])
    chosen = choose_impl("lightning_attention", impl, default, IMPLS)
    if chosen is Impl.TRITON:
        o, final = triton_op.forward(
            q,
            k,
            v,
            log_decay,
            scale=scale,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            with_final=return_final_state,
        )
        return OpResult(o, final)
    forward = forward_of(chosen, q, v)
    lengths = read_lengths(q.shape[0], q.shape[1], cu_seqlens)
    with full_precision(q.device):
        o, final = forward(
            q, k, v, log_decay, scale=scale, initial_state=initial_state, lengths=lengths
        )
    return OpResult(o, final if return_final_state else None)


def lightning_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    snapshots: Snapshots,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl | str | None = None,
) -> OpResult:
    """Lightning attention that also writes the states it passes at given tokens into a pool.

    o and final_state are lightning_attention's; pool[slot] becomes the state of a sequence after a
    number of its tokens, for each stop. It takes no gradient.

    Args:
        q, k, v, log_decay, scale, initial_state, cu_seqlens, impl: as in lightning_attention.
        snapshots: the pool, and which state goes where; lies on the host, so nothing waits.

    Returns:
        OpResult(o [B, T, H, V], final_state [N, H, K, V]).

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention; a stop outside its
            sequence, a slot that is named twice or lies outside the pool.

    Source: as lightning_attention.
    """
    N = check(q, k, v, log_decay, initial_state, cu_seqlens)
    check_snapshots(snapshots, q, v.shape[-1])
    default = default_impl(q.device, q.dtype, q.shape[-1], v.shape[-1])
    chosen = choose_impl("lightning_attention_prefill", impl, default, IMPLS)
    options = {"scale": scale, "initial_state": initial_state, "snapshots": snapshots}
    with torch.no_grad(), full_precision(q.device):
        if chosen is Impl.TRITON:
            found = triton_op.forward_with_snapshots(
                q, k, v, log_decay, cu_seqlens=cu_seqlens, **options
            )
            return OpResult(*found)
        forward = forward_of(chosen, q, v)
        lengths = read_lengths(q.shape[0], q.shape[1], cu_seqlens)
        check_stops(snapshots.stops, lengths)
        found = forward_by_parts(forward, (q, k, v), log_decay, lengths=lengths, **options)
    return OpResult(found[0], found[1].view(N, *found[1].shape[1:]))


def default_impl(device: torch.device, dtype: torch.dtype, K: int, V: int) -> Impl:
    """Return the implementation that runs when none is named.

    Args:
        device: where the tokens lie.
        dtype: the tokens' dtype.
        K, V: widths.

    Returns:
        TRITON for bf16 and fp16 on a GPU where both widths lie in 1 to 256, NUMBA for fp32 on a CPU
        where 32 divides both, else EAGER.
    """
    widths_fit = min(K, V) >= 1 and max(K, V) <= triton_op.MAX_WIDTH
    if device.type == "cuda" and dtype in _LOW_PRECISION and widths_fit:
        return Impl.TRITON
    return Impl.EAGER if _numba_refusal(device, dtype, K, V) else Impl.NUMBA


def _numba_refusal(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why numba cannot compute this, if it cannot."""
    if device.type != "cpu" or dtype is not torch.float32 or torch.compiler.is_compiling():
        return f"q must be fp32 on a CPU, not compiled, for impl numba, got {dtype} on {device}"
    for name, size in (("K", K), ("V", V)):
        if size % _NUMBA_WIDTH or not size:
            return f"{name} must be a multiple of {_NUMBA_WIDTH} for impl numba, got {size}"
    return None


def forward_of(impl: Impl, q: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of an implementation that is no kernel; arguments as reference.forward's."""
    if impl is not Impl.NUMBA:
        return reference.forward if impl is Impl.REFERENCE else eager.forward
    if refusal := _numba_refusal(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        raise UnsupportedError(refusal)
    # numba takes half a second to import: only who needs it waits for it.
    from sevenfold.ops.lightning import compiled

    return compiled.forward


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float = 1.0,
    impl: Impl | str | None = None,
) -> OpResult:
    """One token of lightning attention for each sequence: the decoding step.

        S = exp(log_decay_h) * state + k v^T        o = scale * q^T S

    Args:
        q, k: [B, H, K], bf16, fp16, fp32 or fp64.
        v: [B, H, V], dtype of q.
        log_decay: [H] fp32, <= 0; its sign is not checked here, where every microsecond counts.
        state: [B, H, K, V] fp32 (fp64 with fp64 inputs); it is not changed.
        scale: multiplies the output.
        impl: "reference", "eager" or "triton", which takes no gradient; None takes triton for bf16,
            fp16 and fp32 on a GPU where none is asked for and K, V <= 256, else eager. A named one
            never falls back.

    Returns:
        OpResult(o [B, H, V] in v's dtype, final_state [B, H, K, V], a new tensor).

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention.

    Source: as lightning_attention.
    """
    if q.dim() != 3:
        raise ValueError(f"q must have shape [B, H, K], got {list(q.shape)}")
    _check_tokens(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), log_decay)
    _check_state("state", state, q, (*q.shape, v.shape[-1]))
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state))
    default = Impl.EAGER if wants_gradient else default_decode_impl(q, v.shape[-1])
    chosen = choose_impl("lightning_attention_step", impl, default, _STEP_IMPLS)
    if chosen is Impl.TRITON:
        return OpResult(*triton_op.lightning_step(q, k, v, log_decay, state, float(scale)))
    if chosen is Impl.REFERENCE:
        decay = torch.exp(log_decay.to(state.dtype))
        q_, k_, v_ = (x.to(state.dtype) for x in (q, k, v))
        with full_precision(q.device):
            o, state = reference.step(q_, k_, v_, decay, state, scale)
        return OpResult(o.to(v.dtype), state)
    with full_precision(q.device):
        return OpResult(*eager.step(q, k, v, log_decay, scale=scale, state=state))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Check the arguments that all calls over whole sequences share; return N."""
    _check_tokens(q, k, v, log_decay)
    # Only where it costs no synchronisation with a device.
    if log_decay.device.type == "cpu" and len(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be <= 0, got {log_decay.max().item()}")
    N = _num_sequences(q, cu_seqlens)
    _check_state("initial_state", initial_state, q, (N, *q.shape[2:], v.shape[-1]))
    return N


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, K], got {list(q.shape)}")
    B, T, H, K = q.shape
    check_dtype("q", q, _DTYPES)
    check_shape("k", k, (B, T, H, K), "[B, T, H, K]")
    if v.dim() != 4:
        raise ValueError(f"v must have shape [B, T, H, V], got {list(v.shape)}")
    check_shape("v", v, (B, T, H, v.shape[-1]), "[B, T, H, V]")
    check_shape("log_decay", log_decay, (H,), "[H]")
    check_dtype("log_decay", log_decay, (torch.float32,))
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, (q.dtype,))
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay)):
        check_device(name, x, q.device)
    if log_decay.requires_grad:
        raise ValueError("log_decay must be fixed, got a tensor that requires a gradient")


def _check_state(name: str, state: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    if state is None:
        return
    check_shape(name, state, shape, "[N, H, K, V]")
    check_dtype(name, state, (torch.promote_types(q.dtype, torch.float32),))
    check_device(name, state, q.device)


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return B
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    if B != 1:
        raise ValueError(f"cu_seqlens needs a packed batch: B must be 1, got {B}")
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must run from 0 to T = {T}, got {cu_seqlens.tolist()}")
    return len(cu_seqlens) - 1
