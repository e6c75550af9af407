"""What judges the parity matrix in bf16, and a few of its cases on a CPU; a GPU takes more."""

import pytest
import torch
from matrix import Case, fake_graphs
from matrix_bf16 import POSSIBLE, QUICK, check
from near_ties import check_near_greedy
from tokenizers import Tokenizer

# The first of each way to draft, and one whose bits must be those of each request alone.
CPU = {case.drafts: case for case in reversed(QUICK) if not case.invariant}
CPU |= {"invariant": next(case for case in QUICK if case.invariant)}


@pytest.mark.parametrize("case", CPU.values(), ids=str)
def test_tokens(case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = fake_graphs(case, monkeypatch)
    check(case, "cpu", tokenizer)
    assert (captured.replayed > 0) == case.graphs


def logits(*seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three logits: 8, the second, 0; exact, and with an error of 0.01."""
    exact = torch.tensor([[8.0, second, 0.0] for second in seconds], dtype=torch.float64)
    return exact, (exact + torch.tensor([0.01, 0.0, 0.0])).float()


def test_a_near_tie_may_go_either_way() -> None:
    exact, eager = logits(7.99, 7.5, 7.981)
    assert check_near_greedy([0, 0, 0], exact, eager) == 1
    assert check_near_greedy([1, 0, 1], exact, eager) == 1


def test_a_real_difference_fails() -> None:
    exact, eager = logits(7.99, 7.9, 7.98)
    with pytest.raises(AssertionError, match=r"token 1, 1, lies 1.000e-01 below the best: the er"):
        check_near_greedy([1, 1, 0], exact, eager)
    with pytest.raises(AssertionError, match="token 2, 2, lies"):
        check_near_greedy([1, 0, 2], exact, eager)
    with pytest.raises(AssertionError, match="token 0"):
        check_near_greedy([2, 0, 0], exact, torch.full_like(eager, float("nan")))


def test_a_gpu_meets_every_two_values() -> None:
    drafts = {(case.drafts, case.memory) for case in QUICK}
    assert drafts == {(case.drafts, case.memory) for case in POSSIBLE}
    assert {case.mix for case in QUICK if case.invariant} == {"alone", "together", "later"}
