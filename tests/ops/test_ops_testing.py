"""The error rule and the poison themselves: a check that cannot fail is a defect."""

import pytest
import torch

from sevenfold.ops.testing import check_error, error_bound, poisoned_allocations

EXACT = torch.tensor([4.0, -8.0], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def test_bound_is_twice_the_honest_error_and_one_rounding() -> None:
    assert error_bound(EXACT, EXACT.float() + 0.25) == 2 * (0.25 + EPS * 8)
    assert error_bound(EXACT, EXACT.float()) == 2 * EPS * 8
    assert error_bound(EXACT, EXACT.bfloat16()) == 2 * torch.finfo(torch.bfloat16).eps * 8
    assert error_bound(torch.zeros(0), torch.zeros(0)) == 0


def test_an_error_up_to_the_bound_passes() -> None:
    check_error("y", EXACT.float() + 0.5, EXACT.float() + 0.25, EXACT)
    check_error("y", EXACT, EXACT, EXACT)
    check_error("y", torch.zeros(0), torch.zeros(0), torch.zeros(0).double())


@pytest.mark.parametrize(
    ("kernel", "eager"),
    [
        (EXACT + 0.51, EXACT.float() + 0.25),
        (EXACT - 0.51, EXACT.float() - 0.25),
        (EXACT.float() * (1 + 4 * EPS), EXACT.float()),
        (EXACT * torch.nan, EXACT.float()),
        (EXACT * torch.inf, EXACT.float()),
        (torch.zeros(2), EXACT.float()),
        (EXACT, EXACT * torch.nan),
    ],
)
def test_an_error_beyond_the_bound_fails(kernel: torch.Tensor, eager: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match=r"^y: error .* exceeds"):
        check_error("y", kernel, eager, EXACT)


def test_another_shape_fails() -> None:
    with pytest.raises(AssertionError, match=r"y: shape torch.Size\(\[1\]\), not"):
        check_error("y", EXACT[:1], EXACT, EXACT)


def test_an_overflowing_honest_run_fails() -> None:
    with pytest.raises(AssertionError):
        check_error("y", torch.zeros(2), EXACT * torch.inf, EXACT)


def test_poison_reaches_every_uninitialised_tensor_and_leaves_again() -> None:
    x = torch.zeros(3)
    with poisoned_allocations():
        empty = [torch.empty(3), torch.empty_like(x), x.new_empty(3)]
        whole = torch.empty(3, dtype=torch.int64).fill_(7)
    assert all(bool(y.isnan().all()) for y in empty)
    assert whole.tolist() == [7, 7, 7]
    assert "poisoned" not in repr((torch.empty, torch.empty_like, torch.Tensor.new_empty))
