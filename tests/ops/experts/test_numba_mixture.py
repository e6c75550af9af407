"""The mixture by blocks of rows, in fp32 on a CPU, against the formula in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.config import UnsupportedError
from sevenfold.ops import Dispatch, Impl, mixture, plan_dispatch
from sevenfold.ops.experts import default_mixture_impl
from sevenfold.ops.linear import mkl
from sevenfold.ops.testing import check_error, poisoned_allocations

E, D, WIDTH = 4, 64, 32
NAMES = ("y", "dx", "dweights", "dgate_up_proj", "ddown_proj")


@pytest.fixture(params=[False, True], autouse=True)
def products_by_mkl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(mkl, "FASTEST", request.param)
    return request.param


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().float()


def inputs(T: int, k: int) -> list[Tensor]:
    shapes = [(T, D), (T, k), (E, 2 * WIDTH, D), (E, D, WIDTH)]
    return [random(*shape, seed=i) for i, shape in enumerate(shapes)]


def dispatch(T: int, k: int, capacity: int | None = None, experts: int = E) -> Dispatch:
    generator = torch.Generator().manual_seed(T)
    rows = [torch.randperm(experts, generator=generator)[:k] for _ in range(T)]
    chosen = torch.stack(rows) if rows else torch.zeros(0, k, dtype=torch.int64)
    return plan_dispatch(chosen, E, capacity)


def formula(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
    """Row by row: y_t = sum of w W_down (silu(gate) up) over the choices that were kept."""
    k, y = weights.shape[1], torch.zeros_like(x)
    owner = torch.repeat_interleave(torch.arange(E), plan.rows_per_expert)
    for choice, e in zip(plan.choice.tolist(), owner.tolist(), strict=True):
        gate, up = (gate_up[e] @ x[choice // k]).chunk(2)
        fed = weights.flatten()[choice] * (down[e] @ (F.silu(gate) * up))
        y = y.index_add(0, torch.tensor([choice // k]), fed[None])
    return y


def by(impl: str) -> Callable[..., Tensor]:
    return lambda *arguments: mixture(*arguments, impl=impl)


def with_gradients(run: Callable, leaves: list[Tensor], plan: Dispatch) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = run(*leaves, plan)
    dy = random(*y.shape, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(
    ("T", "k", "capacity", "experts"),
    [
        (1, 2, None, E),
        (5, 2, None, E),
        (33, 2, None, E),
        (70, 4, None, E),
        (40, 2, 3, E),
        (9, 1, None, 1),
    ],
)
def test_the_error_rule(
    T: int, k: int, capacity: int | None, experts: int, products_by_mkl: bool
) -> None:
    plan, leaves = dispatch(T, k, capacity, experts), inputs(T, k)
    with poisoned_allocations():
        found = with_gradients(by("numba"), leaves, plan)
    honest = with_gradients(by("eager"), leaves, plan)
    exact = with_gradients(formula, [leaf.double() for leaf in leaves], plan)
    for name, *three in zip(NAMES, found, honest, exact, strict=True):
        check_error(name, *three)
    with torch.no_grad():
        alone = mixture(*leaves, plan, impl="numba")
    check_error("y alone", alone, honest[0], exact[0])
    assert products_by_mkl or torch.equal(alone, found[0])


def test_no_tokens() -> None:
    found = with_gradients(by("numba"), inputs(0, 2), dispatch(0, 2))
    assert [list(x.shape) for x in found[:3]] == [[0, D], [0, D], [0, 2]]
    assert not any(x.any() for x in found[3:])


def test_a_gradient_taken_twice() -> None:
    leaves, plan = [leaf.requires_grad_() for leaf in inputs(40, 2)], dispatch(40, 2)
    y = mixture(*leaves, plan, impl="numba")
    twice = [torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*twice, strict=True))


def test_weights_of_another_dtype() -> None:
    leaves, plan = inputs(5, 2), dispatch(5, 2)
    leaves[1].requires_grad_()
    expected = mixture(*leaves, plan, impl="numba").detach()
    leaves[1] = leaves[1].detach().double().requires_grad_()
    y = mixture(*leaves, plan, impl="numba")
    assert torch.equal(y, expected)
    y.sum().backward()
    assert leaves[1].grad.dtype is torch.float64


def test_a_number_that_is_not_finite_stays_in_its_token() -> None:
    leaves, plan = inputs(6, 2), dispatch(6, 2)
    y = mixture(*leaves, plan, impl="numba")
    leaves[0][2, 3] = float("nan")
    bad = mixture(*leaves, plan, impl="numba")
    others = [0, 1, 3, 4, 5]
    assert torch.equal(bad[others], y[others])
    assert bad[2].isnan().all()


def test_the_default() -> None:
    x, _, gate_up, _ = inputs(3, 1)
    assert default_mixture_impl(x, gate_up) is Impl.NUMBA
    for other in (x.double(), x.bfloat16(), x.to("meta")):
        assert default_mixture_impl(other, gate_up.to(other)) is Impl.EAGER
    with torch.autocast("cpu", torch.bfloat16):
        assert default_mixture_impl(x, gate_up) is Impl.EAGER
    assert default_mixture_impl(x, gate_up[:, :-2]) is Impl.EAGER


def test_what_it_cannot_do_is_refused() -> None:
    leaves, plan = inputs(3, 1), dispatch(3, 1)
    message = "x must be fp32 on a CPU for impl numba, got torch.float64 on cpu"
    with pytest.raises(UnsupportedError, match=message):
        mixture(*(leaf.double() for leaf in leaves), plan, impl="numba")
    x, weights, gate_up, down = leaves
    with pytest.raises(UnsupportedError, match=r"F must be a multiple of 32 .* got 31"):
        mixture(x, weights, gate_up[:, :-2], down[..., :-1], plan, impl="numba")
