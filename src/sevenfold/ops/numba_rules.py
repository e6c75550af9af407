"""Where loops compiled by numba run. Imports no numba, which takes half a second to load."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError


def suits_numba(*tensors: Tensor) -> bool:
    """Whether loops compiled by numba can take these: fp32 on a CPU, not empty, not traced."""
    if torch.compiler.is_compiling():
        return False
    return all(x.device.type == "cpu" and x.dtype is torch.float32 and x.numel() for x in tensors)


def check_numba(name: str, x: Tensor) -> None:
    """Raise UnsupportedError unless suits_numba."""
    if not suits_numba(x):
        raise UnsupportedError(
            f"{name} must be fp32 on a CPU, not empty, for impl numba, got {x.dtype} on {x.device}"
        )
