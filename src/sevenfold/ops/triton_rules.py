"""Where our Triton kernels run: a GPU, and the dtypes that they compute in fp32."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def runs_on_gpu(x: Tensor) -> bool:
    """Whether x lies on a GPU in bf16, fp16 or fp32."""
    return x.device.type == "cuda" and x.dtype in _DTYPES


def check_on_gpu(name: str, x: Tensor) -> None:
    """Raise UnsupportedError unless runs_on_gpu."""
    if not runs_on_gpu(x):
        raise UnsupportedError(
            f"{name} must be bf16, fp16 or fp32 on a GPU for impl triton, got {x.dtype} on "
            f"{x.device}"
        )


def check_width(name: str, width: int, most: int) -> None:
    """Raise UnsupportedError unless a width is at most what a kernel takes."""
    if width > most:
        raise UnsupportedError(f"{name} must be at most {most} for impl triton, got {width}")
