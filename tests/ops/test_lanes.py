"""What is done to whole vectors: exponentials and their sum, the largest, SiLU."""

import math

import numpy as np
import torch
from numba import njit

from sevenfold.ops.lanes import exp_of, max_of, silu_times
from sevenfold.ops.testing import check_error


@njit
def exponentials(x, at, count, less):
    return exp_of(x, at, count, less)


@njit
def largest(x, at, count, least):
    return max_of(x, at, count, least)


@njit
def gated(out, x, up_at):
    silu_times(out, 0, x, 0, up_at, len(out))


def test_two_units_in_the_last_place() -> None:
    x = np.linspace(-87, 88, 64 * 3000, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    exponentials(x, 0, len(x), np.float32(0))
    assert (np.abs(x - exact) / exact).max() <= 2 * torch.finfo(torch.float32).eps


def test_the_sum_of_what_lies_between() -> None:
    x = np.random.default_rng(0).standard_normal(200, dtype=np.float32)
    before = torch.from_numpy(x.copy())
    total = torch.tensor(exponentials(x, 16, 128, np.float32(0.5)))
    assert np.array_equal(x[:16], before[:16])
    assert np.array_equal(x[144:], before[144:])
    weights = before[16:144] - 0.5
    check_error("exp", torch.from_numpy(x[16:144]), weights.exp(), weights.double().exp())
    check_error("sum", total, weights.exp().sum(), weights.double().exp().sum())


def test_the_ends_and_what_is_no_number() -> None:
    x = np.zeros(64, np.float32)
    x[:4] = -math.inf, -1e30, math.inf, math.nan
    assert math.isnan(exponentials(x, 0, 64, np.float32(0)))
    assert 0 <= x[0] == x[1] <= 2 * torch.finfo(torch.float32).tiny
    assert x[2] > torch.finfo(torch.float32).max / 4
    assert math.isnan(x[3])
    assert (x[4:] == 1).all()


def test_the_largest() -> None:
    x = np.random.default_rng(0).standard_normal(192, dtype=np.float32)
    for at in range(64):
        assert largest(x, at, 128, np.float32(-9)) == x[at : at + 128].max()
    assert largest(x, 0, 64, np.float32(9)) == 9
    x[5] = math.nan
    assert largest(x, 0, 64, np.float32(9)) == 9


def test_silu_of_one_half_times_the_other() -> None:
    x = torch.randn(160, generator=torch.Generator().manual_seed(0))
    out = torch.empty(80)
    gated(out.numpy(), x.numpy(), 80)
    gate, up = x.chunk(2)
    eager = torch.nn.functional.silu(gate) * up
    check_error("silu", out, eager, torch.nn.functional.silu(gate.double()) * up.double())
