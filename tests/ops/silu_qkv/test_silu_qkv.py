"""SiLU of the projection on a CPU: layout, values, refusals."""

import pytest
import torch

from sevenfold.config import UnsupportedError
from sevenfold.ops import silu_qkv, swiglu
from sevenfold.ops.testing import check_error


def test_each_head_holds_its_q_k_and_v() -> None:
    """Two heads of width 2: the projection reads q q k k v v, head by head."""
    x = torch.arange(12, dtype=torch.float64).view(1, 1, 12)
    y = x / (1 + torch.exp(-x))
    places = ([0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11])
    for part, place in zip(silu_qkv(x, 2), places, strict=True):
        check_error(
            str(place), part, y[0, 0, place].view(1, 1, 2, 2).float(), y[..., place].view_as(part)
        )


def test_gradcheck() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: silu_qkv(x, 2), x)


def test_a_size_that_is_no_multiple() -> None:
    with pytest.raises(ValueError, match="qkv must have a last size that is a multiple of 3 x 2"):
        silu_qkv(torch.zeros(3, 8), 2)


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="qkv must be bf16, fp16 or fp32 on a GPU for impl"):
        silu_qkv(torch.zeros(3, 6), 1, impl="triton")
    with pytest.raises(UnsupportedError, match="gate_up must be bf16, fp16 or fp32 on a GPU for i"):
        swiglu(torch.zeros(3, 6), impl="triton")
