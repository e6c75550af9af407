"""Operators called past torch's dispatcher: when, and with what result."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sevenfold.ops.operator import Operator, operator


@operator("sevenfold_tests::times")
def times(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """factor x y."""
    return x * y * factor


@times.register_fake
def _(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.factor = inputs
    ctx.save_for_backward(*tensors)


def _grads(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None]:
    x, y = ctx.saved_tensors
    return dz * y * ctx.factor, dz * x * ctx.factor, None


times.register_autograd(_grads, setup_context=_save)


@operator("sevenfold_tests::counted")
def counted(x: Tensor) -> Tensor:
    """x + 1, without a gradient."""
    return x + 1


@counted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Seen(TorchDispatchMode):
    """Names of the operators that went through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass that torch must ask."""


@contextmanager
def refusing(op: Operator) -> Iterator[None]:
    """Let the way through torch.library fail."""

    def refuse(*_: Any) -> None:
        raise AssertionError("went through torch.library")

    definition, op.definition = op.definition, refuse  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        op.definition = definition


def numbers(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def results(run: Any) -> list[Tensor]:
    x, y = numbers(0).requires_grad_(), nn.Parameter(numbers(1))
    z = run(x, y, 0.5)
    return [z.detach(), *torch.autograd.grad(z, (x, y), numbers(2))]


def test_direct_calls_equal_those_through_the_dispatcher() -> None:
    with refusing(times):
        found = results(times)
    assert all(map(torch.equal, found, results(times.definition)))


def test_without_a_gradient_nothing_is_recorded() -> None:
    x = numbers(0).requires_grad_()
    with refusing(times), torch.no_grad():
        assert not times(x, x, 2.0).requires_grad
    with refusing(times):
        assert not times(x.detach(), x.detach(), 2.0).requires_grad


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, y = numbers(0), numbers(1).requires_grad_()
    with refusing(times):
        times(x, y, 2.0).sum().backward()
    assert x.grad is None
    assert y.grad is not None
    assert torch.equal(y.grad, x * 2.0)


def test_a_dispatch_mode_sees_the_operator() -> None:
    with Seen() as seen:
        times(numbers(0), numbers(1), 1.0)
    assert "sevenfold_tests.times.default" in seen.names


def test_a_subclass_of_tensor_is_asked() -> None:
    x = numbers(0).as_subclass(Marked)
    with refusing(times), pytest.raises(AssertionError, match=r"torch\.library"):
        times(x, x, 1.0)
    assert isinstance(times(x, x, 1.0), Marked)


def test_fake_and_meta_tensors_run_no_kernel() -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(numbers(0))
        assert isinstance(counted(x), FakeTensor)
    meta = numbers(0).to("meta")
    with refusing(times), pytest.raises(AssertionError, match=r"torch\.library"):
        times(meta, meta, 1.0)
    assert times(meta, meta, 1.0).is_meta


def test_an_operator_without_a_gradient_refuses_a_backward() -> None:
    y = counted(numbers(0).requires_grad_())
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(times, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(compiled), results(times)))


def test_torch_accepts_the_operators() -> None:
    x, y = numbers(0).requires_grad_(), numbers(1).requires_grad_()
    torch.library.opcheck(times.definition, (x, y, 0.5))
    torch.library.opcheck(counted.definition, (numbers(0),))
