"""RMSNorm and its two fusions: the public operators, their checks and the implementation."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.numba_rules import check_numba, suits_numba
from sevenfold.ops.rms_norm import eager
from sevenfold.ops.triton_rules import check_on_gpu, check_width, runs_on_gpu
from sevenfold.ops.types import Impl

# A row stays in the registers of one program.
_MAX_TRITON_WIDTH = 16_384
_KNOWN = (Impl.EAGER, Impl.NUMBA, Impl.TRITON)


def default_rms_norm_impl(x: Tensor) -> Impl:
    """Return what the norms take.

    Triton for bf16, fp16 and fp32 on a GPU up to 16,384 channels, numba for fp32 on a CPU, else
    eager.
    """
    if suits_numba(x):
        return Impl.NUMBA
    fits = runs_on_gpu(x) and x.shape[-1] <= _MAX_TRITON_WIDTH
    return Impl.TRITON if fits else Impl.EAGER


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: Impl | str | None = None) -> Tensor:
    """Divide by the root mean square over the last dimension, and scale each channel.

        y = x * r * weight        r = (mean(x^2) + eps)^(-1/2)

    Args:
        x: [..., D], any floating dtype.
        weight: [D], any floating dtype.
        eps: > 0.
        impl: "eager", "numba" or "triton" (one pass each way); None takes default_rms_norm_impl. A
            named one never falls back.

    Returns:
        [..., D] in x's dtype; computed in fp32 at least.

    Raises:
        ValueError: weight's shape is not [D].
        UnsupportedError: numba or triton is asked for on another device, dtype or width, or there
            is no implementation of that name.

    Source: arXiv 1910.07467.
    """
    chosen = _choose("rms_norm", x, weight, impl)
    if chosen is Impl.EAGER:
        return eager.rms_norm(x, weight, eps)
    if chosen is Impl.NUMBA:
        from sevenfold.ops.rms_norm import compiled

        return compiled.rms_norm(x, weight.float(), eps)
    from sevenfold.ops.rms_norm import triton_rms_norm

    return triton_rms_norm.rms_norm(x, weight, eps)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, impl: Impl | str | None = None
) -> Tensor:
    """Normalise, and multiply by the sigmoid of a gate: MiniMax's norm over all heads.

        y = x * r * weight * sigmoid(gate)        r = (mean(x^2) + eps)^(-1/2)

    Args:
        x: [..., D], any floating dtype.
        gate: [..., D], dtype of x, before the sigmoid.
        weight: [D], any floating dtype.
        eps: > 0.
        impl: "eager", "numba" or "triton" (one pass each way, saves its inputs only); None takes
            default_rms_norm_impl. A named one never falls back.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: as in rms_norm.

    Source: arXiv 2501.08313 (MiniMax-01) section 2.2.
    """
    check_shape("gate", gate, x.shape, "x's")
    check_dtype("gate", gate, (x.dtype,))
    chosen = _choose("gated_rms_norm", x, weight, impl)
    if chosen is Impl.EAGER:
        return eager.rms_norm(x, weight, eps) * torch.sigmoid(gate)
    if chosen is Impl.NUMBA:
        from sevenfold.ops.rms_norm import compiled

        return compiled.gated_rms_norm(x, gate, weight.float(), eps)
    from sevenfold.ops.rms_norm import triton_rms_norm

    return triton_rms_norm.gated_rms_norm(x, gate, weight, eps)


def residual_rms_norm(
    stream: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a layer's update to the residual stream, and normalise the sum.

        x = alpha * stream + beta * update        y = x * r * weight

    Args:
        stream: [..., D], any floating dtype.
        update: [..., D]; any floating dtype.
        weight: [D], any floating dtype.
        eps: > 0.
        alpha: factor of the stream (DeepNorm's; 3.5565588200778455 in MiniMax-Text-01).
        beta: factor of the update.
        impl: "eager", "numba" or "triton" (one pass each way); None takes default_rms_norm_impl. A
            named one never falls back.

    Returns:
        y and x, [..., D], in the wider dtype of stream and update.

    Raises:
        ValueError: a shape breaks the rules above.
        UnsupportedError: as in rms_norm.

    Source: arXiv 2203.00555 (DeepNorm).
    """
    check_shape("update", update, stream.shape, "stream's")
    chosen = _choose("residual_rms_norm", stream, weight, impl)
    if chosen is not Impl.TRITON:
        x = torch.add(update if beta == 1.0 else beta * update, stream, alpha=alpha)
        return rms_norm(x, weight, eps, impl=chosen if x.dtype is stream.dtype else None), x
    check_on_gpu("update", update)
    from sevenfold.ops.rms_norm import triton_residual

    return triton_residual.residual_rms_norm(stream, update, weight, eps, alpha, beta)


def post_rms_norm(
    stream: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    impl: Impl | str | None = None,
) -> Tensor:
    """Normalise the sum of a stream and an update that nobody else reads; in inference.

        y = x * r * weight        x = alpha * stream + beta * update

    The y of residual_rms_norm; its x is written nowhere. It takes no gradient.

    Args:
        stream, update, weight, eps, alpha, beta: as residual_rms_norm's.
        impl: "eager", "numba" or "triton" (one pass); None takes default_rms_norm_impl. A named one
            never falls back.

    Returns:
        [..., D], in the wider dtype of stream and update.

    Raises:
        ValueError: a shape breaks the rules.
        UnsupportedError: as in rms_norm.

    Source: arXiv 2203.00555 (DeepNorm).
    """
    chosen = _choose("post_rms_norm", stream, weight, impl)
    if chosen is not Impl.TRITON:
        how = {"alpha": alpha, "beta": beta, "impl": chosen}
        return residual_rms_norm(stream, update, weight, eps, **how)[0]
    check_shape("update", update, stream.shape, "stream's")
    check_on_gpu("update", update)
    from sevenfold.ops.rms_norm import triton_residual

    return triton_residual.post_rms_norm(stream, update, weight, eps, alpha, beta)


def _choose(op: str, x: Tensor, weight: Tensor, impl: Impl | str | None) -> Impl:
    check_shape("weight", weight, x.shape[-1:], "[D]")
    chosen = choose_impl(op, impl, default_rms_norm_impl(x), _KNOWN)
    if chosen is Impl.NUMBA:
        check_numba("x", x)
    if chosen is Impl.TRITON:
        check_on_gpu("x", x)
        check_width("D", x.shape[-1], _MAX_TRITON_WIDTH)
    return chosen
