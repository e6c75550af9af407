"""SiLU of the projection on a CPU: layout, values, refusals."""

import pytest
import torch

from sevenfold.config import UnsupportedError
from sevenfold.ops import silu_qkv, swiglu
from sevenfold.ops.testing import check_error


def test_each_head_holds_its_q_k_and_v() -> None:
    """Two heads of width 2: the projection reads q q k k v v, head by head."""
    x = torch.arange(12, dtype=torch.float64).view(1, 1, 12)
    y = x / (1 + torch.exp(-x))
    places = ([0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11])
    for part, place in zip(silu_qkv(x, 2), places, strict=True):
        check_error(
            str(place), part, y[0, 0, place].view(1, 1, 2, 2).float(), y[..., place].view_as(part)
        )


def test_gradcheck() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: silu_qkv(x, 2), x)


def test_a_size_that_is_no_multiple() -> None:
    with pytest.raises(ValueError, match="qkv must have a last size that is a multiple of 3 x 2"):
        silu_qkv(torch.zeros(3, 8), 2)


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="qkv must be bf16, fp16 or fp32 on a GPU for impl"):
        silu_qkv(torch.zeros(3, 6), 1, impl="triton")
    with pytest.raises(UnsupportedError, match="gate_up must be bf16, fp16 or fp32 on a GPU for i"):
        swiglu(torch.zeros(3, 6), impl="triton")


def test_numba_keeps_the_error_rule() -> None:
    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, *dy = (3 * torch.randn(7, n, generator=generator).bfloat16() for n in (36, 12, 12, 12))
        x = x.to(dtype).requires_grad_()
        parts = silu_qkv(x, 3, impl=impl)
        grads = [g.view(7, 3, 4).to(dtype) for g in dy]
        return [*(p.detach() for p in parts), *torch.autograd.grad(parts, x, grads)]

    found, honest = run(torch.float32, "numba"), run(torch.float32, "eager")
    for name, *three in zip("qkvd", found, honest, run(torch.float64, "eager"), strict=True):
        check_error(name, *three)


def test_numba_is_the_default_for_fp32_on_a_cpu() -> None:
    x = torch.linspace(-4, 4, 24).view(2, 12)
    for one, other in zip(silu_qkv(x, 2), silu_qkv(x, 2, impl="numba"), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UnsupportedError, match="qkv must be fp32 on a CPU, not empty, for impl nu"):
        silu_qkv(x.double(), 2, impl="numba")


def test_one_gradient_of_three() -> None:
    x = torch.linspace(-4, 4, 24).view(2, 12).requires_grad_()
    found, honest = (
        torch.autograd.grad(silu_qkv(x, 2, impl=impl)[1].square().sum(), x)[0]
        for impl in ("numba", "eager")
    )
    exact_x = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(silu_qkv(exact_x, 2)[1].square().sum(), exact_x)[0]
    check_error("dqkv", found, honest, exact)
