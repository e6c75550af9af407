"""RMSNorm: its formula, its gradients, its memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sevenfold.ops import rms_norm
from sevenfold.ops.testing import check_error, poisoned_allocations

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def formula(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def honest_formula(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """As models write it: the statistic in fp32, the result in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return formula(x.to(wide), weight.to(wide), eps).to(x.dtype)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)


def with_grads(run, x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = run(x, weight, EPS)
    dy = random(*y.shape, dtype=y.dtype, seed=9)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def test_hand_worked_values() -> None:
    """(3, 4) has mean square 12.5; with eps 12.5 the root is 1/5."""
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([10.0, -5.0])
    assert torch.equal(rms_norm(x, weight, 12.5).round(decimals=5), torch.tensor([[6.0, -4.0]]))
    assert torch.equal(rms_norm(torch.zeros(2, 2), weight, EPS), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (40, 6), (2, 9, 64)])
def test_formula_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    found = with_grads(rms_norm, x, weight)
    exact = with_grads(formula, x.double(), weight.double())
    if dtype == torch.float64:
        assert [t.dtype for t in found] == [dtype] * 3
        for name, one, wanted in zip(("y", "dx", "dweight"), found, exact, strict=True):
            # The exact statement is as honest as any in fp64: as far as fp32 could tell.
            check_error(name, one, wanted.float(), wanted)
        return
    honest = with_grads(honest_formula, x, weight)
    for name, *three in zip(("y", "dx", "dweight"), found, honest, exact, strict=True):
        assert three[0].dtype == dtype
        check_error(name, *three)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 4), (5, 1), (0, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape).requires_grad_(), random(shape[-1], seed=1).requires_grad_()
    if x.numel():
        assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 0.1), (x, weight))
    else:
        y, dx, dweight = with_grads(rms_norm, x.detach(), weight.detach())
        assert y.shape == dx.shape == shape
        assert torch.equal(dweight, torch.zeros_like(dweight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_gradient_the_same_values(dtype: torch.dtype) -> None:
    x, weight = random(7, 6, dtype=dtype), random(6, dtype=dtype, seed=1)
    expected, *_ = with_grads(rms_norm, x, weight)
    assert torch.equal(rms_norm(x, weight, EPS), expected)
    x.requires_grad_()
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), expected)
    with torch.inference_mode():
        exact = rms_norm(x.detach().double(), weight.double(), EPS)
        check_error("y", rms_norm(x, weight, EPS), expected, exact)
    assert rms_norm(x, weight, EPS).requires_grad


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    leaves = [random(7, 6), random(6, seed=1)]
    expected = with_grads(rms_norm, *leaves)[1 + wanted]
    leaves[wanted].requires_grad_()
    y = rms_norm(*leaves, EPS)
    y.backward(random(7, 6, seed=9))
    assert torch.equal(leaves[wanted].grad, expected)
    assert leaves[1 - wanted].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_activations_with_an_fp32_weight(dtype: torch.dtype) -> None:
    """As autocast has it: the result follows x, each gradient its own tensor."""
    x, weight = random(40, 6, dtype=dtype), random(6, dtype=torch.float32, seed=1)
    found = with_grads(rms_norm, x, weight)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    exact = with_grads(formula, x.double(), weight.double())
    honest = with_grads(honest_formula, x, weight)
    for name, *three in zip(("y", "dx", "dweight"), found, honest, exact, strict=True):
        check_error(name, *three)


def test_large_activations_stay_finite_in_fp16() -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    y, dx, dweight = with_grads(rms_norm, x, torch.ones(8, dtype=torch.float16))
    assert torch.equal(y, torch.ones_like(y))  # 6e4^2 is far beyond fp16
    assert bool(dx.isfinite().all())
    exact = random(2, 8, seed=9).sum(0)
    check_error("dweight", dweight, exact.half(), exact)


def test_a_view_that_is_not_contiguous() -> None:
    x, weight = random(6, 5).mT, random(12, seed=1)[::2]
    found = with_grads(rms_norm, x, weight)
    expected = with_grads(rms_norm, x.contiguous(), weight.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_input_stays_as_it_was() -> None:
    x, weight = random(4, 6), random(6, seed=1)
    before = x.clone(), weight.clone()
    rms_norm(x, weight, EPS)
    with_grads(rms_norm, x, weight)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_nothing_is_read_unwritten() -> None:
    x, weight = random(4, 6, dtype=torch.float32), random(6, dtype=torch.float32, seed=1)
    expected = with_grads(rms_norm, x, weight)
    with poisoned_allocations():
        found = with_grads(rms_norm, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_backward_keeps_its_inputs_only() -> None:
    x, weight, saved = random(4, 6).requires_grad_(), random(6).requires_grad_(), []
    with saved_tensors_hooks(lambda y: saved.append(y.data_ptr()) or y, lambda y: y):
        rms_norm(x, weight, EPS)
    assert saved == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("shape", [(5,), (7,), (1,), (1, 6), ()])
def test_weight_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight must have shape \[D\] = \[6\], got"):
        rms_norm(torch.zeros(3, 6), torch.ones(shape), EPS)
