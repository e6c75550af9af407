"""The linear layer with a weight in int8 or fp8: the public operators and their choice."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.low_precision import FP8
from sevenfold.ops.quantised import eager, scaled
from sevenfold.ops.quantised.rule import product_path
from sevenfold.ops.types import Impl

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_FP8_CAPABILITY = (8, 9)


def default_int8_impl(x: Tensor) -> Impl:
    """Return what int8 products take: triton for bf16 and fp16 on a GPU, else eager."""
    return Impl.TRITON if x.device.type == "cuda" and x.dtype in _KERNEL_DTYPES else Impl.EAGER


def default_fp8_impl(x: Tensor, codes: Tensor) -> Impl:
    """Return what fp8_linear takes.

    On a GPU, up to 64 rows of bf16 or fp16 triton, which is bound by the weight's bytes; beyond
    scaled_mm for bf16 with N and K that 16 divides, else triton. Elsewhere eager.
    """
    chosen = default_int8_impl(x)
    if chosen is Impl.EAGER or product_path(_num_rows(x)) == "few":
        return chosen
    return Impl.SCALED_MM if x.dtype is torch.bfloat16 and scaled.suits(codes) else chosen


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, *, impl: Impl | str | None = None
) -> Tensor:
    """Multiply by a weight matrix that is held in int8.

        y = x (codes * scale)^T

    The eager form rounds the weight to the dtype of x, as a loaded one is; the kernel widens codes
    exactly, and multiplies its fp32 sums by the scale (beyond 512 rows it does as eager).

    Args:
        x: [..., K], bf16, fp16 or fp32.
        codes: [N, K] int8, contiguous.
        scale: [N] fp32, one for each output channel.
        impl: "eager" or "triton" (bf16 and fp16 on a GPU; its way is product_path's); None takes
            default_int8_impl. A named one never falls back.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: triton is asked for on another device or dtype, or there is no
            implementation of that name.
    """
    _check_product(x, codes, scale, torch.int8)
    known = (Impl.EAGER, Impl.TRITON)
    if choose_impl("int8_linear", impl, default_int8_impl(x), known) is Impl.EAGER:
        return eager.int8_linear(x, codes, scale)
    check_kernel(x)
    from sevenfold.ops.quantised import triton_linear

    y = triton_linear.int8_linear(x.reshape(-1, x.shape[-1]), codes, scale)
    return y.view(*x.shape[:-1], len(codes))


def fp8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, *, impl: Impl | str | None = None
) -> Tensor:
    """Multiply by a weight matrix that is held in fp8, rows in fp8 too.

        y = (rounded.codes rounded.scale) (codes * scale)^T    rounded = quantise_rows_fp8(x)

    A row's scale is its own, so that a row's result depends on no other row.

    Args:
        x: [..., K], bf16, fp16 or fp32.
        codes: [N, K] float8_e4m3fn, contiguous.
        scale: [N] fp32, one for each output channel.
        impl: "eager" (products of fp32), "triton" (bf16 and fp16 on a GPU) or "scaled_mm" (bf16,
            N and K multiples of 16: PyTorch's product of fp8 matrices); None takes
            default_fp8_impl. A named one never falls back.

    Returns:
        [..., N] in x's dtype, sums in fp32.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: the implementation cannot serve the device, dtype or widths, the GPU has
            no fp8, or there is no implementation of that name.
    """
    _check_product(x, codes, scale, FP8)
    check_fp8_device(x.device)
    known = (Impl.EAGER, Impl.TRITON, Impl.SCALED_MM)
    chosen = choose_impl("fp8_linear", impl, default_fp8_impl(x, codes), known)
    if chosen is Impl.EAGER:
        return eager.fp8_linear(x, codes, scale)
    rows = x.reshape(-1, x.shape[-1])
    if chosen is Impl.SCALED_MM:
        _check_scaled_mm(x, codes)
        y = scaled.fp8_linear(rows, codes, scale)
    else:
        check_kernel(x)
        from sevenfold.ops.quantised import triton_linear

        y = triton_linear.fp8_linear(rows, codes, scale)
    return y.view(*x.shape[:-1], len(codes))


def check_fp8_device(device: torch.device) -> None:
    """Raise UnsupportedError unless a device computes with fp8: a CPU by conversion, a GPU itself.

    A GPU needs compute capability 8.9 (Ada) or more.
    """
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise UnsupportedError(f"fp8 weights must lie on a GPU or a CPU, got {device}; use int8")
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise UnsupportedError(
            f"fp8 weights must lie on a GPU of compute capability 8.9 or more, got "
            f"{torch.cuda.get_device_name(device)} of {capability[0]}.{capability[1]}; use int8"
        )


def check_kernel(x: Tensor) -> None:
    """Raise UnsupportedError unless the kernels serve x."""
    if default_int8_impl(x) is not Impl.TRITON:
        raise UnsupportedError(
            f"x must be bf16 or fp16 on a GPU for impl triton, got {x.dtype} on {x.device}"
        )


def _num_rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _check_product(x: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    N, K = codes.shape
    check_shape("x", x, (*x.shape[:-1], K), "[..., K]")
    check_shape("scale", scale, (N,), "[N]")
    check_dtype("codes", codes, (dtype,))


def _check_scaled_mm(x: Tensor, codes: Tensor) -> None:
    if x.dtype is not torch.bfloat16 or not scaled.suits(codes):
        raise UnsupportedError(
            f"x must be bf16, and N and K multiples of 16, for impl scaled_mm, got {x.dtype} and "
            f"{list(codes.shape)}; use impl='triton' or 'eager'"
        )
