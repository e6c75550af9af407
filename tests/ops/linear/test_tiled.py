"""Products by register tiles: the error rule for any size and stride."""

import pytest
import torch
from torch import Tensor

from sevenfold.ops import linear
from sevenfold.ops.linear import tiled
from sevenfold.ops.testing import check_error
from sevenfold.ops.tile import COLUMNS, ROWS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIZES = [
    (1, 1, 1),
    (9, 5, 3),
    (ROWS, 300, COLUMNS),
    (65, 33, COLUMNS + 1),
    (130, 513, 95),
    (257, 64, 8 * COLUMNS),
]


@pytest.mark.parametrize(("turn_a", "turn_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("M", "K", "N"), SIZES)
def test_the_error_rule(M: int, K: int, N: int, turn_a: int, turn_b: int) -> None:
    a = random(K, M).t() if turn_a else random(M, K)
    b = random(K, N, seed=1).t() if turn_b else random(N, K, seed=1)
    check_error("product", tiled.matmul_nt(a, b), a @ b.t(), a.double() @ b.double().t())


def test_the_same_bits_with_any_number_of_threads() -> None:
    a, b, threads = random(200, 300), random(70, 300, seed=1), torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(tiled.matmul_nt(a, b))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_number_that_is_not_finite_stays_in_its_row() -> None:
    a, b = random(20, 40), random(33, 40, seed=1)
    before = tiled.matmul_nt(a, b)
    a[7, 3] = torch.nan
    after = tiled.matmul_nt(a, b)
    assert after[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("turn_a", [False, True])
def test_a_product_is_added_to_what_is_there(turn_a: bool) -> None:
    a, b, c = random(70, 300), random(45, 300, seed=1), random(70, 60, seed=2)
    exact = c.double()
    exact[:, :45] += a.double() @ b.double().t()
    eager, out = c.clone(), c.clone()
    eager[:, :45] += a @ b.t()
    left = a.t().contiguous().t() if turn_a else a
    tiled.add_matmul_nt(out[:, :45], left, tiled.pack(b), keep=True)
    check_error("sum", out, eager, exact)
    assert torch.equal(out[:, 45:], c[:, 45:])


def test_rows_that_share_a_place_in_the_cache() -> None:
    a, b = random(72, 1024)[:, :301], random(33, 301, seed=1)
    assert torch.equal(tiled.matmul_nt(a, b), tiled.matmul_nt(a.contiguous(), b))


@pytest.mark.parametrize("rows", [2, 20])
def test_a_weight_s_storage_stays_free_to_be_resized(rows: int) -> None:
    weight = random(40, 20)
    linear(random(rows, 20), weight, impl="numba")
    assert weight.untyped_storage().resizable()
