"""What numba's loops share: the exponential, sums in a fixed order, and PyTorch's threads."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from sevenfold.ops.compiled import FASTMATH, dot32, exp32, lent, max32, sum32


@njit(fastmath=FASTMATH)
def fill(x, y):
    for i in range(len(x)):
        y[i] = exp32(x[i])


@njit
def folded(x, y):
    return dot32(x, y), sum32(x), max32(x)


def exponential(x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    fill(x, y)
    return y


def test_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    relative = np.abs(exponential(x) - exact) / exact
    assert relative.max() <= 2 * torch.finfo(torch.float32).eps


def test_the_ends_and_what_is_no_number() -> None:
    ends = exponential(np.array([-math.inf, -1e30, math.inf, math.nan, 0], dtype=np.float32))
    tiny = torch.finfo(torch.float32).tiny
    assert 0 <= ends[0] == ends[1] <= 2 * tiny
    assert ends[2] > torch.finfo(torch.float32).max / 4
    assert math.isnan(ends[3])
    assert ends[4] == 1


@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 1000])
def test_sums_of_any_length(size: int) -> None:
    x, y = torch.randn(2, size, generator=torch.Generator().manual_seed(size)).numpy()
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    dot, total, largest = folded(x, y)
    np.testing.assert_allclose(dot, wide_x @ wide_y, atol=1e-6 * np.abs(wide_x * wide_y).sum())
    np.testing.assert_allclose(total, wide_x.sum(), atol=1e-6 * np.abs(wide_x).sum())
    assert largest == x.max()


def test_torch_keeps_its_number_of_threads() -> None:
    script = "import torch; torch.set_num_threads(1); import sevenfold.ops.compiled; "
    script += "print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"1\n"


def test_a_lent_weight_can_be_freed_and_filled_again() -> None:
    weight = torch.arange(6.0).view(2, 3).requires_grad_()
    array = lent(weight)
    assert array.tolist() == weight.tolist()
    del array
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(24)
