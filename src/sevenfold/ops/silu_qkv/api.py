"""SiLU of a query-key-value projection: the public operator, its checks and the implementation."""

from torch import Tensor

from sevenfold.ops.checks import choose_impl
from sevenfold.ops.numba_rules import check_numba, suits_numba
from sevenfold.ops.silu_qkv import eager
from sevenfold.ops.triton_rules import check_on_gpu, check_width, runs_on_gpu
from sevenfold.ops.types import Impl

_MAX_TRITON_WIDTH = 1024


def default_silu_qkv_impl(qkv: Tensor, num_heads: int) -> Impl:
    """Return what silu_qkv takes.

    Triton for bf16, fp16, fp32 on a GPU up to heads of 1,024, numba for fp32 on a CPU, else eager.
    """
    if suits_numba(qkv):
        return Impl.NUMBA
    fits = runs_on_gpu(qkv) and qkv.shape[-1] <= 3 * num_heads * _MAX_TRITON_WIDTH
    return Impl.TRITON if fits else Impl.EAGER


def silu_qkv(
    qkv: Tensor, num_heads: int, *, impl: Impl | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply SiLU to a projection that lies head by head, and part it into q, k and v.

        q, k, v = silu(qkv)        silu(x) = x sigmoid(x), with qkv = [H, (q, k, v), D]

    Args:
        qkv: [..., H * 3 * D], any floating dtype.
        num_heads: H.
        impl: "eager" (views of one tensor), "numba" (the same, one pass each way) or "triton"
            (three tensors, token-major and contiguous; the backward takes their three gradients in
            one pass, without joining them first); None takes default_silu_qkv_impl. A named one
            never falls back.

    Returns:
        q, k and v, [..., H, D] in qkv's dtype.

    Raises:
        ValueError: the last size is no multiple of 3 H.
        UnsupportedError: numba or triton is asked for on another device, dtype or width, or there
            is no implementation of that name.

    Source: arXiv 2501.08313 (MiniMax-01) section 2.2.
    """
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv must have a last size that is a multiple of 3 x {num_heads} heads, got "
            f"{qkv.shape[-1]}"
        )
    default = default_silu_qkv_impl(qkv, num_heads)
    chosen = choose_impl("silu_qkv", impl, default, (Impl.EAGER, Impl.NUMBA, Impl.TRITON))
    if chosen is Impl.EAGER:
        return eager.forward(qkv, num_heads)
    if chosen is Impl.NUMBA:
        check_numba("qkv", qkv)
        from sevenfold.ops.silu_qkv import compiled

        return compiled.silu_qkv(qkv, num_heads)
    check_on_gpu("qkv", qkv)
    check_width("D", qkv.shape[-1] // (3 * num_heads), _MAX_TRITON_WIDTH)
    from sevenfold.ops.silu_qkv import triton_silu_qkv

    return triton_silu_qkv.silu_qkv(qkv, num_heads)
