"""What numba's loops share: the exponential."""

import math

import numpy as np
import torch
from numba import njit

from sevenfold.ops.compiled import FASTMATH, exp32


@njit(fastmath=FASTMATH)
def fill(x, y):
    for i in range(len(x)):
        y[i] = exp32(x[i])


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
