"""Dispatch: who goes where, who is dropped, and the way back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    Dispatch,
    combine,
    combine_parts,
    gather_parts,
    gather_rows,
    plan_dispatch,
)
from sevenfold.ops.testing import check_error

few = settings(derandomize=True, max_examples=60, deadline=None)


@st.composite
def choices(draw) -> tuple[torch.Tensor, int, int | None]:
    """Distinct experts of each token, the number of experts, and a capacity."""
    E = draw(st.integers(1, 5))
    k = draw(st.integers(1, E))
    T = draw(st.integers(0, 9))
    rows = [draw(st.permutations(range(E)))[:k] for _ in range(T)]
    experts = torch.tensor(rows, dtype=torch.int64).view(T, k)
    return experts, E, draw(st.none() | st.integers(1, 6))


def kept_choices(experts: torch.Tensor, E: int, capacity: int | None) -> list[list[int]]:
    """The tokens of each expert's rows: the first ones that chose it."""
    tokens = [[t for t, row in enumerate(experts.tolist()) if e in row] for e in range(E)]
    return [chosen[:capacity] for chosen in tokens]


@few
@given(choices())
def test_rows_are_sorted_by_expert_and_keep_the_order_of_tokens(case) -> None:
    expected = kept_choices(*case)
    plan = plan_dispatch(*case)
    assert plan.token.tolist() == [token for tokens in expected for token in tokens]
    assert plan.rows_per_expert.tolist() == [len(tokens) for tokens in expected]
    assert plan.rows_per_expert.dtype == torch.int32


@few
@given(choices())
def test_every_kept_choice_has_one_row_and_every_dropped_one_none(case) -> None:
    experts, E, capacity = case
    plan, kept = plan_dispatch(*case), kept_choices(*case)
    R = len(plan.token)
    owner = torch.repeat_interleave(torch.arange(E), plan.rows_per_expert).tolist()
    rows = [row for row in plan.row.flatten().tolist() if row < R]
    assert sorted(rows) == list(range(R))
    for t, (chosen, places) in enumerate(zip(experts.tolist(), plan.row.tolist(), strict=True)):
        for expert, row in zip(chosen, places, strict=True):
            if t in kept[expert]:
                assert (plan.token[row], owner[row]) == (t, expert)
            else:
                assert row == R
    assert capacity is not None or experts.numel() == R


@few
@given(choices(), st.data())
def test_a_choice_is_dropped_because_of_earlier_tokens_only(case, data) -> None:
    experts, E, capacity = case
    T = len(experts)
    first = data.draw(st.integers(0, T))
    whole, part = plan_dispatch(*case), plan_dispatch(experts[:first], E, capacity)
    dropped = whole.row == len(whole.token)
    assert torch.equal(dropped[:first], part.row == len(part.token))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


EXPERTS = torch.tensor([[0, 2], [2, 1], [0, 2], [2, 3]])
PLANS = [plan_dispatch(EXPERTS, 5, capacity) for capacity in (None, 3, 1)]
ids = ["dropless", "one dropped", "many dropped"]


def test_a_hand_worked_drop() -> None:
    plan = PLANS[2]
    assert plan.token.tolist() == [0, 1, 0, 3]
    assert plan.row.tolist() == [[0, 2], [4, 1], [4, 4], [4, 3]]
    assert plan.rows_per_expert.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("plan", PLANS, ids=ids)
def test_gather_copies_tokens_and_sums_gradients(plan: Dispatch) -> None:
    x = random(4, 3).requires_grad_()
    assert torch.equal(gather_rows(x, plan), x[plan.token])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan), x)


@pytest.mark.parametrize("plan", PLANS, ids=ids)
def test_combine_is_the_weighted_sum(plan: Dispatch) -> None:
    rows, weights = random(len(plan.token), 3), random(4, 2, seed=1)
    padded = torch.cat([rows, torch.zeros(1, 3, dtype=rows.dtype)])
    exact = torch.einsum("tj,tjd->td", weights, padded[plan.row])
    low = (rows.bfloat16(), weights.bfloat16())
    parts = [low[1][:, j : j + 1] * padded.bfloat16()[plan.row[:, j]] for j in range(2)]
    check_error("y in bf16", combine(*low, plan), parts[0] + parts[1], exact)
    check_error("y", combine(rows, weights, plan), exact, exact)
    leaves = (rows.requires_grad_(), weights.requires_grad_())
    assert torch.autograd.gradcheck(lambda rows, weights: combine(rows, weights, plan), leaves)


@pytest.mark.parametrize("sizes", [(3, 1, 4), (0, 8, 0), (8, 0, 0), (0, 0, 8)])
def test_parts_are_the_whole_apart(sizes: tuple[int, int, int]) -> None:
    plan, x = PLANS[0], random(4, 3).requires_grad_()
    weights = random(4, 2, seed=1).requires_grad_()
    rows = gather_rows(x, plan).detach()
    parts = gather_parts(x, rows, plan, sizes)
    assert [len(part) for part in parts] == list(sizes)
    assert torch.equal(torch.cat(parts), rows)
    assert torch.equal(combine_parts(parts, weights, plan), combine(rows, weights, plan))

    def there_and_back(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = gather_rows(x, plan).detach()
        first, second, third = gather_parts(x, rows, plan, sizes)
        return combine_parts((first, 2 * second, third.square()), weights, plan)

    def whole(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        first, second, third = gather_rows(x, plan).split(sizes)
        return combine(torch.cat([first, 2 * second, third.square()]), weights, plan)

    # Not gradcheck: what was copied ahead stays as it was.
    found, exact = (
        torch.autograd.grad(run(x, weights).sin().sum(), (x, weights))
        for run in (there_and_back, whole)
    )
    assert all(map(torch.equal, found, exact))


def test_parts_refuse_rows_of_nobody_and_other_sizes() -> None:
    plan, x = PLANS[0], random(4, 3)
    rows = gather_rows(x, plan)
    spare = replace(plan, is_full=False)
    with pytest.raises(ValueError, match="dispatch must be full, got a plan whose rows may belong"):
        gather_parts(x, rows, spare, (3, 1, 4))
    with pytest.raises(ValueError, match="dispatch must be full, got a plan whose rows may belong"):
        combine_parts((rows, rows[:0], rows[:0]), x[:, :2], spare)
    with pytest.raises(ValueError, match=r"parts must have 8 rows in all, got \(3, 1, 3\)"):
        gather_parts(x, rows, plan, (3, 1, 3))
    with pytest.raises(ValueError, match=r"parts must have 8 rows in all, got \(8, 8, 0\)"):
        combine_parts((rows, rows, rows[:0]), x[:, :2], plan)
    with pytest.raises(ValueError, match=r"rows must have shape \[R, D\] = \[8, 3\], got \[7, 3\]"):
        gather_parts(x, rows[1:], plan, (3, 1, 4))
    for name, run in (
        ("x", lambda: gather_parts(x, rows, plan, (3, 1, 4), impl="triton")),
        ("parts", lambda: combine_parts(
            (rows, rows[:0], rows[:0]), x[:, :2], plan, impl="triton")),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=f"{name} must be bf16, fp16 or fp32 on a GPU"):
            run()


def test_one_choice_for_each_token() -> None:
    plan = plan_dispatch(torch.tensor([[1], [0], [1]]), 2, capacity=1)
    x, weights = random(3, 2).requires_grad_(), random(3, 1).requires_grad_()
    y = combine(gather_rows(x, plan), weights, plan)
    kept = torch.tensor([[1.0], [1.0], [0.0]])
    assert torch.equal(y, kept * weights * x)
    assert torch.autograd.gradcheck(
        lambda x, weights: combine(gather_rows(x, plan), weights, plan), (x, weights)
    )


@pytest.mark.parametrize("capacity", [None, 2])
def test_no_tokens(capacity: int | None) -> None:
    plan = plan_dispatch(torch.zeros(0, 2, dtype=torch.int64), 3, capacity)
    assert plan.rows_per_expert.tolist() == [0, 0, 0]
    x = torch.zeros(0, 4, requires_grad=True)
    y = combine(gather_rows(x, plan), torch.zeros(0, 2), plan)
    assert y.shape == (0, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 4)
