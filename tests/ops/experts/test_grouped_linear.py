"""The grouped product: the loop against a statement, grouped_mm against the loop, the refusals."""

import re

import pytest
import torch

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl, grouped_linear
from sevenfold.ops.experts import default_grouped_impl
from sevenfold.ops.experts import eager as grouped_eager
from sevenfold.ops.testing import check_error

COUNTS = [(2, 5, 1, 8), (0, 3, 0, 4), (0, 0, 0, 7), (1, 1, 1, 1)]
needs_grouped_mm = pytest.mark.skipif(
    not grouped_eager.has_grouped_mm(), reason="PyTorch without grouped_mm"
)


def inputs(counts: tuple[int, ...], dtype: torch.dtype, K: int = 16, N: int = 8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(counts), K), (len(counts), N, K), (sum(counts), N)]
    values = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return *values, torch.tensor(counts, dtype=torch.int32)


def with_grads(x, weight, dy, rows_per_expert, impl: str) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if impl == "statement":
        expert = torch.repeat_interleave(torch.arange(len(weight)), rows_per_expert)
        y = torch.einsum("rk,rnk->rn", x, weight[expert])
    else:
        y = grouped_linear(x, weight, rows_per_expert, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize("impl", ["eager", pytest.param("grouped_mm", marks=needs_grouped_mm)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
def test_each_row_meets_its_own_expert(
    counts: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    x, weight, dy, rows = inputs(counts, dtype)
    exact = with_grads(x.double(), weight.double(), dy.double(), rows, "statement")
    honest = with_grads(x, weight, dy, rows, "statement")
    found = with_grads(x, weight, dy, rows, impl)
    for name, *three in zip(("y", "dx", "dweight"), found, honest, exact, strict=True):
        assert three[0].dtype == dtype
        check_error(name, *three)


@needs_grouped_mm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_mm_keeps_to_the_loops_error(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, dy, rows = inputs(counts, dtype)
    exact = with_grads(x.double(), weight.double(), dy.double(), rows, "eager")
    honest, found = (with_grads(x, weight, dy, rows, impl) for impl in ("eager", "grouped_mm"))
    for name, *three in zip(("y", "dx", "dweight"), found, honest, exact, strict=True):
        check_error(name, *three)


def test_gradcheck_of_the_loop_with_odd_widths() -> None:
    x, weight, _, rows = inputs((2, 0, 3), torch.float64, K=3, N=5)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, rows), leaves)


def test_no_rows_at_all() -> None:
    x, weight, _, rows = inputs((0, 0), torch.float32)
    assert torch.equal(grouped_linear(x, weight, rows), torch.zeros(0, 8))


def test_an_unused_expert_gets_a_zero_gradient() -> None:
    x, weight, dy, rows = inputs((0, 3, 0, 4), torch.float32)
    dweight = with_grads(x, weight, dy, rows, "eager")[2]
    assert [bool(expert.any()) for expert in dweight] == [False, True, False, True]


def test_default_is_the_loop_on_a_cpu() -> None:
    assert default_grouped_impl("cpu", torch.float32) is Impl.EAGER
    assert default_grouped_impl("cuda", torch.float64) is Impl.EAGER
    x, weight, _, rows = inputs((3, 4), torch.bfloat16, K=3, N=5)
    assert torch.equal(
        grouped_linear(x, weight, rows), grouped_linear(x, weight, rows, impl="eager")
    )


def test_default_is_grouped_mm_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, Impl.GROUPED_MM), (False, Impl.EAGER)):
        monkeypatch.setattr(grouped_eager, "has_grouped_mm", lambda has=has: has)
        assert default_grouped_impl("cuda", torch.bfloat16) is expected


ROWS = torch.tensor([1, 2], dtype=torch.int32)
WEIGHT = torch.zeros(2, 8, 8)


@pytest.mark.parametrize(
    ("error", "x", "rows", "message"),
    [
        (ValueError, torch.zeros(3, 4), ROWS, "x must have shape [R, K] = [3, 8], got [3, 4]"),
        (ValueError, torch.zeros(3, 1, 8), ROWS, "x must have shape [R, K] = [3, 8]"),
        (ValueError, torch.zeros(3, 8), ROWS[:1], "rows_per_expert must have shape [E] = [2]"),
        (TypeError, torch.zeros(3, 8), ROWS.long(), "rows_per_expert must be torch.int32, got"),
    ],
)
def test_wrong_arguments(
    error: type[Exception], x: torch.Tensor, rows: torch.Tensor, message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        grouped_linear(x, WEIGHT, rows)


def test_weight_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"weight must be torch.bfloat16, got torch.float32"):
        grouped_linear(torch.zeros(3, 8).bfloat16(), WEIGHT, ROWS)


@pytest.mark.parametrize(
    ("dtype", "K", "N", "message"),
    [
        (torch.float32, 5, 8, "K must fill whole 16 bytes for impl grouped_mm, got 5 x 4 bytes"),
        (torch.bfloat16, 8, 4, "N must fill whole 16 bytes for impl grouped_mm, got 4 x 2 bytes"),
        (torch.float64, 8, 8, "impl grouped_mm must have bf16, fp16 or fp32, got torch.float64"),
    ],
)
def test_grouped_mm_refuses(dtype: torch.dtype, K: int, N: int, message: str) -> None:
    x, weight, _, rows = inputs((1, 2), dtype, K=K, N=N)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        grouped_linear(x, weight, rows, impl="grouped_mm")


def test_grouped_mm_needs_a_pytorch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_eager, "has_grouped_mm", lambda: False)
    x, weight, _, rows = inputs((1, 2), torch.float32)
    with pytest.raises(UnsupportedError, match=r"must have torch.nn.functional.grouped_mm, got to"):
        grouped_linear(x, weight, rows, impl="grouped_mm")


def test_impl_names() -> None:
    x, weight, _, rows = inputs((1, 2), torch.float32)
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'loop'"):
        grouped_linear(x, weight, rows, impl="loop")
    with pytest.raises(UnsupportedError, match="grouped_linear must use impl eager, grouped_mm"):
        grouped_linear(x, weight, rows, impl="onednn")
