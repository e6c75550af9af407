"""Routing and the whole mixture on a CPU: their formulas, and what they refuse."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    Dispatch,
    Impl,
    combine,
    gather_rows,
    grouped_swiglu,
    mixture,
    plan_dispatch,
    route,
    route_and_count,
    router_logits,
)
from sevenfold.ops.experts import (
    default_dispatch_impl,
    default_mixture_impl,
    default_route_impl,
    default_router_impl,
)
from sevenfold.ops.testing import check_error

EXPERTS = torch.tensor([[0, 2], [2, 1], [0, 2], [2, 3]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs() -> list[Tensor]:
    """x, weights, gate_up_proj, down_proj for 4 tokens, 4 experts, widths 6 and 5."""
    return [random(4, 6), random(4, 2, seed=1), random(4, 10, 6, seed=2), random(4, 6, 5, seed=3)]


def by_tokens(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
    """Token by token, choice by choice."""
    y = torch.zeros_like(x)
    for t, chosen in enumerate(EXPERTS.tolist()):
        for j, e in enumerate(chosen):
            if plan.row[t, j] < len(plan.choice):
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                y[t] += weights[t, j] * (down[e] @ (F.silu(gate) * up))
    return y


@pytest.mark.parametrize("capacity", [None, 3, 1])
def test_mixture_is_the_weighted_sum_of_the_experts(capacity: int | None) -> None:
    plan = plan_dispatch(EXPERTS, 4, capacity)
    leaves = inputs()
    exact = by_tokens(*leaves, plan)
    check_error("y", mixture(*leaves, plan), exact.float(), exact)
    low = [leaf.bfloat16() for leaf in leaves]
    check_error("y in bf16", mixture(*low, plan), by_tokens(*low, plan), exact)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *t: mixture(*t, plan), leaves)


def test_grouped_swiglu_is_the_mixture_of_rows_that_are_sorted() -> None:
    plan, leaves = plan_dispatch(EXPERTS, 4, None), inputs()
    _, _, gate_up, down = leaves
    rows = gather_rows(leaves[0], plan)
    exact = mixture(*leaves, plan)
    ends = plan.rows_per_expert.cumsum(0, dtype=torch.int32)
    found = combine(grouped_swiglu(rows, gate_up, down, ends), leaves[1], plan)
    check_error("y", found, exact.float(), exact)
    rows, gate_up, down = (x.requires_grad_() for x in (rows.detach(), gate_up, down))
    assert torch.autograd.gradcheck(lambda *t: grouped_swiglu(*t, ends), (rows, gate_up, down))
    low = [x.detach().float() for x in (rows, gate_up, down)]
    rounded = grouped_swiglu(*(x.bfloat16() for x in low), ends)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_swiglu(*low, ends), rounded)


def test_autocast_rounds_rows_and_projections() -> None:
    plan = plan_dispatch(EXPERTS, 4, None)
    x, weights, *projections = (leaf.float() for leaf in inputs())
    low = mixture(x.bfloat16(), weights, *(p.bfloat16() for p in projections), plan)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixture(x, weights, *projections, plan), low)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_routing_is_the_softmax_of_the_chosen(k: int) -> None:
    logits = random(7, 5)
    weights, experts = route(logits, k)
    values, order = logits.sort(-1, descending=True)
    assert torch.equal(experts, order[:, :k])
    exact = values[:, :k].softmax(-1)
    check_error("weights", weights, exact.float(), exact)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_totals_are_sums_over_the_tokens(k: int) -> None:
    logits = random(7, 5)
    weights, experts, _ = route_and_count(logits, k)
    assert all(map(torch.equal, (weights, experts), route(logits, k)))
    (total,) = route_and_count(logits.float(), k)[2]
    chosen = torch.bincount(experts.flatten(), minlength=5).double()
    squares = logits.exp().sum(-1).log().square().sum()
    exact = torch.cat([logits.softmax(-1).sum(0), chosen, squares[None]])
    check_error("totals", total, exact.float(), exact)
    run = lambda x: tuple(y for y in route_and_count(x, k) if y.is_floating_point())  # noqa: E731
    assert torch.autograd.gradcheck(run, logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_router_computes_in_fp32_at_least(dtype: torch.dtype) -> None:
    x, weight = random(7, 6).to(dtype), random(5, 6, seed=1).float()
    exact = x.double() @ weight.double().T
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, weight)
    assert logits.dtype == wide
    check_error("logits", logits, (x.to(wide) @ weight.to(wide).T).float(), exact)


def test_defaults_on_a_cpu_are_eager() -> None:
    x, weight = torch.zeros(4, 8).bfloat16(), torch.zeros(4, 8)
    assert default_mixture_impl(x, torch.zeros(4, 16, 8)) is Impl.EAGER
    assert default_router_impl(x, weight) is Impl.EAGER
    assert default_route_impl(weight) is Impl.EAGER
    assert default_dispatch_impl(x) is Impl.EAGER


def test_triton_needs_a_gpu() -> None:
    plan = plan_dispatch(EXPERTS, 4, None)
    x, weights, gate_up, down = (leaf.float() for leaf in inputs())
    for message, run in (
        ("x must be bf16 on a GPU for impl triton, got torch.float32 on cpu",
         lambda: mixture(x, weights, gate_up, down, plan, impl="triton")),
        ("x must be bf16 on a GPU for impl triton, got torch.float32 on cpu",
         lambda: grouped_swiglu(x, gate_up, down, plan.rows_per_expert, impl="triton")),
        ("x must be bf16 on a GPU for impl triton, got torch.float32 on cpu",
         lambda: router_logits(x, x, impl="triton")),
        ("logits must be bf16, fp16 or fp32 on a GPU", lambda: route(x, 2, impl="triton")),
        ("logits must be bf16, fp16 or fp32 on a GPU",
         lambda: route_and_count(x, 2, impl="triton")),
        ("experts must lie on a GPU for impl triton, got cpu",
         lambda: plan_dispatch(EXPERTS, 4, None, impl="triton")),
        ("x must be bf16, fp16 or fp32 on a GPU", lambda: gather_rows(x, plan, impl="triton")),
        ("rows must be bf16, fp16 or fp32 on a GPU",
         lambda: combine(gather_rows(x, plan), weights, plan, impl="triton")),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=re.escape(message)):
            run()


def test_wrong_arguments() -> None:
    plan = plan_dispatch(EXPERTS, 4, None)
    x, weights, gate_up, down = inputs()
    with pytest.raises(ValueError, match=r"x must have shape \[T, D\] = \[4, 6\], got \[4, 5\]"):
        mixture(x[:, :5], weights, gate_up, down, plan)
    with pytest.raises(ValueError, match=r"weights must have shape \[T, k\] = \[4, 2\], got"):
        mixture(x, weights[:, :1], gate_up, down, plan)
    with pytest.raises(ValueError, match=r"down_proj must have shape \[E, D, F\] = \[4, 6, 5\]"):
        mixture(x, weights, gate_up, down.mT, plan)
    with pytest.raises(TypeError, match=r"down_proj must be torch.float64, got torch.float32"):
        mixture(x, weights, gate_up, down.float(), plan)
    count = plan.rows_per_expert
    with pytest.raises(ValueError, match=r"x must have shape \[R, D\] = \[4, 6\], got \[4, 5\]"):
        grouped_swiglu(x[:, :5], gate_up, down, count)
    with pytest.raises(ValueError, match=r"down_proj must have shape \[E, D, F\] = \[4, 6, 5\]"):
        grouped_swiglu(x, gate_up, down.mT, count)
    with pytest.raises(ValueError, match=r"ends must have shape \[E\] = \[4\]"):
        grouped_swiglu(x, gate_up, down, count[1:])
    with pytest.raises(TypeError, match=r"ends must be torch.int32, got torch.int64"):
        grouped_swiglu(x, gate_up, down, count.long())
    with pytest.raises(TypeError, match=r"down_proj must be torch.float64, got torch.float32"):
        grouped_swiglu(x, gate_up, down.float(), count)
    with pytest.raises(ValueError, match="num_chosen must be from 1 to 6, got 7"):
        route(x, 7)
    with pytest.raises(ValueError, match="num_chosen must be from 1 to 6, got 0"):
        route_and_count(x, 0)
    with pytest.raises(TypeError, match=r"logits must be torch.float32 or torch.float64, got"):
        route(x.half(), 2)
    with pytest.raises(ValueError, match=r"weight must have shape \[E, D\] = \[4, 6\], got"):
        router_logits(x, x[:, :5])
