"""The greedy choice's checks, and what it takes by default."""

import pytest
import torch

from sevenfold import ops
from sevenfold.config import UnsupportedError

NAN, INF = float("nan"), float("inf")


def test_the_first_of_the_largest_and_whether_the_row_is_finite() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0], [-INF, -INF, 0.0], [NAN, INF, 1.0], [-2.0, -1.0, -1.0]])
    found = ops.greedy_tokens(rows)
    assert found.tokens.tolist() == [1, 2, 0, 1]
    assert found.finite.tolist() == [True, False, False, True]


def test_shapes_dtypes_and_devices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"logits must have shape \[N, V\] with V > 0, got \[3\]"):
        ops.greedy_tokens(torch.ones(3))
    with pytest.raises(ValueError, match=r"V > 0, got \[3, 0\]"):
        ops.greedy_tokens(torch.ones(3, 0))
    with pytest.raises(TypeError, match=r"logits must be torch\.float32, got torch\.float64"):
        ops.greedy_tokens(torch.ones(3, 4).double(), impl="triton")
    with pytest.raises(UnsupportedError, match="on a GPU for impl triton"):
        ops.greedy_tokens(torch.ones(3, 4), impl="triton")
    with pytest.raises(UnsupportedError, match="greedy_tokens must use impl eager, triton"):
        ops.greedy_tokens(torch.ones(3, 4), impl="numba")


def test_rows_go_one_token_further() -> None:
    """A row within a page, one at its end, one at the end of its table, and one of nobody."""
    chosen = torch.full((4, 2), 9)
    places = torch.tensor([[3, 15, 31, 0], [7, 9, 12, 0], [3, 15, 15, 0], [4, 16, 32, 0]])
    pages = torch.tensor([[7, 8], [9, 10], [11, 12], [0, 0]])
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, INF], [NAN, NAN]])
    ops.advance_rows(logits, chosen, places, pages, page_tokens=16)
    assert chosen.tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert places.tolist() == [[4, 16, 32, 0], [7, 10, 12, 0], [4, 0, 0, 0], [5, 17, 33, 0]]


def test_what_goes_further_is_checked() -> None:
    chosen, places, pages = (torch.zeros(n, 2, dtype=torch.int64) for n in (2, 4, 2))
    with pytest.raises(ValueError, match=r"logits must have shape \[N, V\] with V > 0, got \[3\]"):
        ops.advance_rows(torch.ones(3), chosen, places, pages, page_tokens=16)
    with pytest.raises(
        ValueError, match=r"places must have shape \[4, N\] = \[4, 2\], got \[2, 2\]"
    ):
        ops.advance_rows(torch.ones(2, 3), chosen, pages, pages, page_tokens=16)
    with pytest.raises(TypeError, match=r"pages must be torch\.int64, got torch\.int32"):
        ops.advance_rows(torch.ones(2, 3), chosen, places, pages.int(), page_tokens=16)
