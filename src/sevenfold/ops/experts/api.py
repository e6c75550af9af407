"""The grouped matrix product: each expert's rows times that expert's weight."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.experts import eager
from sevenfold.ops.types import Impl

# torch.nn.functional.grouped_mm refuses rows whose byte length is no multiple of this.
_ALIGNMENT_BYTES = 16
_GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def default_grouped_impl(device_type: str, dtype: torch.dtype) -> Impl:
    """Return what grouped_linear takes: grouped_mm on a GPU but for fp64, else the loop.

    On a CPU the loop over oneDNN products is three times as fast as grouped_mm (351 against 111
    GFLOP/s for 8192 x 256 x 1024 in 4 groups, fp32, 2 threads of an AMD EPYC).
    """
    fits = device_type == "cuda" and dtype in _GROUPED_MM_DTYPES and eager.has_grouped_mm()
    return Impl.GROUPED_MM if fits else Impl.EAGER


def grouped_linear(
    x: Tensor, weight: Tensor, rows_per_expert: Tensor, *, impl: Impl | str | None = None
) -> Tensor:
    """Multiply each expert's rows by that expert's weight.

        y_r = W_e x_r    for the rows r of expert e

    Args:
        x: [R, K], sorted by expert.
        weight: [E, N, K], dtype of x.
        rows_per_expert: [E] int32, summing to R; an expert may have none.
        impl: "eager" (a loop over experts) or "grouped_mm"; None takes default_grouped_impl. A
            named one never falls back.

    Returns:
        [R, N] in x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype breaks the rules above.
        UnsupportedError: this PyTorch, dtype or width cannot run grouped_mm, or there is no
            implementation of that name.
    """
    E, _, K = weight.shape
    check_shape("x", x, (len(x), K), "[R, K]")
    check_shape("rows_per_expert", rows_per_expert, (E,), "[E]")
    check_dtype("weight", weight, (x.dtype,))
    check_dtype("rows_per_expert", rows_per_expert, (torch.int32,))
    default = default_grouped_impl(x.device.type, x.dtype)
    chosen = choose_impl("grouped_linear", impl, default, (Impl.EAGER, Impl.GROUPED_MM))
    if chosen is Impl.EAGER:
        return eager.loop(x, weight, rows_per_expert)
    _check_grouped_mm(x, weight)
    return eager.grouped_mm(x, weight, rows_per_expert)


def _check_grouped_mm(x: Tensor, weight: Tensor) -> None:
    if not eager.has_grouped_mm():
        raise UnsupportedError(
            f"impl grouped_mm must have torch.nn.functional.grouped_mm, got torch "
            f"{torch.__version__} without it; use impl='eager'"
        )
    if x.dtype not in _GROUPED_MM_DTYPES:
        raise UnsupportedError(f"impl grouped_mm must have bf16, fp16 or fp32, got {x.dtype}")
    for name, size in (("K", weight.shape[2]), ("N", weight.shape[1])):
        if size * x.element_size() % _ALIGNMENT_BYTES:
            raise UnsupportedError(
                f"{name} must fill whole {_ALIGNMENT_BYTES} bytes for impl grouped_mm, got "
                f"{size} x {x.element_size()} bytes; use impl='eager'"
            )
