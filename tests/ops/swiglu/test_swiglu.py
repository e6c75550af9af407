"""SwiGLU: its formula, its gradient, its memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sevenfold.ops import swiglu
from sevenfold.ops.testing import check_error, poisoned_allocations


def formula(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(shape, generator=generator)).bfloat16().to(dtype)


def with_grad(function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype).view_as(y)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


def test_hand_worked_values() -> None:
    y = swiglu(torch.tensor([0.0, 1e4, -1e4, 5.0, 3.0, 7.0]))
    assert torch.equal(y, torch.tensor([0.0, 3e4, -0.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_formula_and_gradient(dtype: torch.dtype) -> None:
    x = random(5, 3, 8, dtype=dtype)
    exact, honest = with_grad(formula, x.double()), with_grad(formula, x)
    for name, found, eager, wanted in zip(
        ("y", "dx"), with_grad(swiglu, x), honest, exact, strict=True
    ):
        assert found.dtype == dtype
        check_error(name, found, eager, wanted)


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 1, 6), (0, 4), (3, 0)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    assert swiglu(x).shape == (*shape[:-1], shape[-1] // 2)
    assert not x.numel() or torch.autograd.gradcheck(swiglu, x)


def test_a_view_that_is_not_contiguous() -> None:
    x = random(6, 5).mT
    y, grad = with_grad(swiglu, x)
    expected, expected_grad = with_grad(swiglu, x.contiguous())
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


def test_nothing_is_read_unwritten() -> None:
    x = random(4, 6, dtype=torch.float32)
    expected = with_grad(swiglu, x)
    with poisoned_allocations():
        found = with_grad(swiglu, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_backward_keeps_its_input_only() -> None:
    x, saved = random(4, 6).requires_grad_(), []
    with saved_tensors_hooks(lambda y: saved.append(y.data_ptr()) or y, lambda y: y):
        swiglu(x)
    assert saved == [x.data_ptr()]


def test_odd_size() -> None:
    with pytest.raises(ValueError, match="gate_up must have an even last size, got 3"):
        swiglu(torch.zeros(2, 3))
