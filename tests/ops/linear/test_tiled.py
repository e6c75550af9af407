"""Products by register tiles: the error rule for any size and stride."""

import pytest
import torch
from torch import Tensor

from sevenfold.ops import Impl, linear
from sevenfold.ops.linear import default_linear_impl, tiled
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


def test_large_results_in_inference_are_made_by_tiles() -> None:
    x, weight = torch.empty(2, 512, 1), torch.empty(2**13, 1)
    with torch.inference_mode():
        assert default_linear_impl(x, weight) is Impl.NUMBA
        assert default_linear_impl(x, weight[:-1]) is not Impl.NUMBA
    assert default_linear_impl(x, weight) is not Impl.NUMBA
    x, weight = random(2, 9, 20), random(40, 20, seed=1)
    y = linear(x, weight, impl="numba")
    check_error("y", y, linear(x, weight, impl="eager"), x.double() @ weight.double().t())


@pytest.mark.parametrize("rows", [2, 20])
def test_a_weight_s_storage_stays_free_to_be_resized(rows: int) -> None:
    weight = random(40, 20)
    linear(random(rows, 20), weight, impl="numba")
    assert weight.untyped_storage().resizable()
