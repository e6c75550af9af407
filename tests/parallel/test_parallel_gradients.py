"""The gradients' norm and their clipping, against one parameter after another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sevenfold.ops.testing import check_error
from sevenfold.parallel import clip_gradients, gradient_norm

# Of a model; the first two are divided by tensor parallelism, the others whole on each rank.
NAMES = (
    "layers.0.self_attn.qkv_proj.weight",
    "layers.0.self_attn.out_proj.weight",
    "layers.0.input_layernorm.weight",
    "norm.weight",
)


class Calls(TorchDispatchMode):
    """Counts operators of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def layout(replicate: int, tensor: int) -> Any:
    config = SimpleNamespace(replicate=replicate, tensor=tensor)
    return SimpleNamespace(config=config, sum_over_all=lambda x: x)


def parameters(dtypes: tuple[torch.dtype, ...]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i, (name, dtype) in enumerate(zip(NAMES, dtypes, strict=True)):
        grad = torch.randn(5 + 7 * i, 3, generator=generator).to(dtype)
        found[name] = nn.Parameter(torch.zeros_like(grad))
        found[name].grad = grad
    found["frozen"] = nn.Parameter(torch.zeros(2))
    return found


def one_by_one(grads: list[Tensor], copies: list[int]) -> Tensor:
    squares = [torch.linalg.vector_norm(g).square() / n for g, n in zip(grads, copies, strict=True)]
    return torch.stack(squares).sum().sqrt()


@pytest.mark.parametrize(
    ("replicate", "tensor", "copies"),
    [(1, 1, [1, 1, 1, 1]), (3, 1, [3, 3, 3, 3]), (1, 2, [1, 1, 2, 2]), (3, 2, [3, 3, 6, 6])],
)
def test_the_norm_counts_each_element_once(replicate: int, tensor: int, copies: list[int]) -> None:
    named = parameters((torch.float32,) * 4)
    grads = [p.grad for p in named.values() if p.grad is not None]
    found = gradient_norm(named.items(), layout(replicate, tensor))
    exact = one_by_one([grad.double() for grad in grads], copies)
    check_error("norm", found, one_by_one(grads, copies), exact)


@pytest.mark.parametrize("run", [
    lambda named: gradient_norm(named.items(), layout(3, 2)),
    lambda named: clip_gradients(named.values(), 0.5, torch.tensor(7.0)),
])  # fmt: skip
def test_many_parameters_take_as_many_operations_as_few(run: Any) -> None:
    found = []
    for layers in (1, 9):
        several = [parameters((torch.float32,) * 4) for _ in range(layers)]
        named = {f"{n}.{name}": p for n, own in enumerate(several) for name, p in own.items()}
        with Calls() as calls:
            run(named)
        found.append(calls.number)
    assert found[0] == found[1]


@pytest.mark.parametrize("limit", [0.5, 1e9])
@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16])
def test_clipping_scales_every_gradient(others: torch.dtype, limit: float) -> None:
    named = parameters((torch.float32, others, torch.float32, others))
    norm = torch.tensor(7.0)
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    expected = [p.grad.clone().mul_(scale) for p in named.values() if p.grad is not None]
    clip_gradients(named.values(), limit, norm)
    found = [p.grad for p in named.values() if p.grad is not None]
    assert all(map(torch.equal, found, expected))
    assert named["frozen"].grad is None


def test_nothing_to_clip() -> None:
    clip_gradients([nn.Parameter(torch.zeros(2))], 1.0, torch.tensor(1.0))
