"""The greedy choice by its kernel, on a GPU or under Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, GPU_UNLESS_INTERPRETED

from sevenfold.ops.greedy import eager, triton_greedy

pytestmark = [
    *GPU_UNLESS_INTERPRETED,
    # NumPy's, in the interpreter.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
NAN, INF = float("nan"), float("inf")


def check(logits: torch.Tensor) -> None:
    tokens, finite = triton_greedy.greedy_tokens(logits)
    wanted = eager.greedy_tokens(logits)
    assert tokens.dtype is torch.int64
    assert finite.dtype is torch.bool
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(finite, wanted[1])


@pytest.mark.parametrize("V", [1, 5, 1024, 32_000, 40_001])
@pytest.mark.parametrize("N", [1, 3])
def test_the_largest_of_random_rows(N: int, V: int) -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(V)).to(DEVICE)
    check(logits)
    check(-logits.abs() - 1)
    check(torch.randn(V, N, device=DEVICE).T)


def test_equal_logits_give_the_first() -> None:
    V = 40_000  # more than one block
    logits = torch.zeros(5, V, device=DEVICE)
    logits[0, [39_999, 20_000, 17_000]] = 2.0
    logits[1, 100] = -0.0
    logits[2, [3, 30_003]] = 7.0
    logits[3, [30_003, 16_387]] = 7.0
    logits[4] = -3.0
    check(logits)


def test_what_is_not_finite_is_told_apart() -> None:
    logits = torch.randn(9, 20_000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[1, 17_000] = NAN
    logits[2, [17_001, 3]] = NAN
    logits[3, 5] = INF
    logits[4, 19_999] = -INF
    logits[5] = -INF
    logits[6] = NAN
    logits[7, :19_000] = -INF  # as biases forbid tokens
    logits[8, [2, 9]] = torch.tensor([INF, NAN], device=DEVICE)
    check(logits)
    negative = torch.full((1, 300), 1.0, device=DEVICE)
    negative[0, 200] = -torch.tensor(NAN, device=DEVICE)
    check(negative)


@pytest.mark.parametrize("V", [5, 20_000])
def test_rows_go_one_token_further(V: int) -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(V)).to(DEVICE)
    logits[2, 3] = NAN
    found, wanted = ([x.to(DEVICE) for x in step_rows()] for _ in range(2))
    for _ in range(3):
        triton_greedy.advance_rows(logits, *found, 16)
        eager.advance_rows(logits, *wanted, 16)
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x, y)


def step_rows() -> tuple[torch.Tensor, ...]:
    """Of a row within a page, one at its end, one at the end of its table, and one of nobody."""
    places = [[3, 15, 47, 0], [8, 11, 16, 0], [3, 15, 15, 0], [4, 16, 48, 0]]
    pages = [[8, 9, 10], [11, 12, 13], [14, 15, 16], [0, 0, 0]]
    return torch.zeros(4, 2, dtype=torch.int64), torch.tensor(places), torch.tensor(pages)
