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
