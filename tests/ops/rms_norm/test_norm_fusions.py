"""RMSNorm's fusions on a CPU: their formulas, and what they refuse."""

import re

import pytest
import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl, gated_rms_norm, post_rms_norm, residual_rms_norm, rms_norm
from sevenfold.ops.rms_norm import default_rms_norm_impl
from sevenfold.ops.testing import check_error

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_norm(dtype: torch.dtype) -> None:
    x, gate, weight = random(3, 5, 8), random(3, 5, 8, seed=1), random(8, seed=2)
    exact = formula(x, weight) / (1 + torch.exp(-gate))
    low = [t.to(dtype) for t in (x, gate, weight)]
    wide = torch.promote_types(dtype, torch.float32)
    normed = formula(low[0].to(wide), low[2].to(wide)).to(dtype)
    found = gated_rms_norm(*low[:2], low[2], EPS)
    assert found.dtype == dtype
    honest = normed * torch.sigmoid(low[1])
    check_error("y", found, honest.float() if dtype == torch.float64 else honest, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_norm(dtype: torch.dtype) -> None:
    stream, update, weight = random(3, 5, 8), random(3, 5, 8, seed=1), random(8, seed=2)
    sum_ = 3.5 * stream + 0.5 * update
    low = [t.to(dtype) for t in (stream, update, weight)]
    y, x = residual_rms_norm(*low, EPS, alpha=3.5, beta=0.5)
    honest = 3.5 * low[0] + 0.5 * low[1]
    wide = torch.promote_types(dtype, torch.float32)
    normed = formula(honest.to(wide), low[2].to(wide)).to(dtype)
    rounds = torch.float32 if dtype == torch.float64 else dtype
    check_error("x", x, honest.to(rounds), sum_)
    check_error("y", y, normed.to(rounds), formula(sum_, weight))


def test_residual_norm_of_plain_sums_by_default() -> None:
    stream, update, weight = random(3, 8), random(3, 8, seed=1), random(8, seed=2)
    y, x = residual_rms_norm(stream, update, weight, EPS)
    assert torch.equal(x, stream + update)
    assert torch.equal(y, rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_alone(dtype: torch.dtype) -> None:
    low = [random(3, 8, dtype=dtype, seed=n) for n in range(2)]
    weight = random(8, seed=2, dtype=dtype)
    y, _ = residual_rms_norm(*low, weight, EPS, alpha=3.5, beta=0.5)
    assert torch.equal(post_rms_norm(*low, weight, EPS, alpha=3.5, beta=0.5), y)
    with pytest.raises(ValueError, match="update must have"):
        post_rms_norm(low[0], low[1][:2], weight, EPS)


def test_gradcheck() -> None:
    leaves = [random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()]
    leaves.append(random(4, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 0.1), leaves)
    assert torch.autograd.gradcheck(
        lambda *t: residual_rms_norm(*t, 0.1, alpha=2.0, beta=0.5), leaves
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_on_a_cpu(dtype: torch.dtype) -> None:
    wanted = Impl.NUMBA if dtype is torch.float32 else Impl.EAGER
    assert default_rms_norm_impl(random(2, 8, dtype=dtype)) is wanted
    assert default_rms_norm_impl(random(0, 8, dtype=dtype)) is Impl.EAGER


def test_numba_refuses_other_dtypes() -> None:
    message = "x must be fp32 on a CPU, not empty, for impl numba, got torch.float64 on cpu"
    with pytest.raises(UnsupportedError, match=message):
        rms_norm(torch.zeros(2, 8).double(), torch.ones(8), EPS, impl="numba")


@pytest.mark.parametrize("rows", [1, 64, 200])
def test_numba_keeps_the_error_rule_over_many_blocks(rows: int) -> None:
    """Rows beyond one block of the weight's gradient; the same bits with any number of threads."""

    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [random(rows, 33, seed=1), random(rows, 33, seed=2), random(33, seed=3)]
        x, gate, weight = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        y = gated_rms_norm(x, gate, weight, EPS, impl=impl)
        dy = random(rows, 33, seed=4).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, (x, gate, weight), dy)]

    found, usual = run(torch.float32, "numba"), torch.get_num_threads()
    honest, exact = run(torch.float32, "eager"), run(torch.float64, "eager")
    for name, *three in zip(("y", "dx", "dgate", "dweight"), found, honest, exact, strict=True):
        check_error(name, *three)
    torch.set_num_threads(3 - min(usual, 2))
    try:
        again = run(torch.float32, "numba")
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "impl"),
    [
        ("cuda", torch.bfloat16, 16_384, Impl.TRITON),
        ("cuda", torch.float32, 1, Impl.TRITON),
        ("cuda", torch.bfloat16, 16_385, Impl.EAGER),
        ("cuda", torch.float64, 8, Impl.EAGER),
        ("cpu", torch.bfloat16, 8, Impl.EAGER),
    ],
)
def test_default_follows_device_dtype_and_width(
    device: str, dtype: torch.dtype, width: int, impl: Impl
) -> None:
    class Somewhere:
        shape = (2, width)

    Somewhere.device, Somewhere.dtype = torch.device(device), dtype
    assert default_rms_norm_impl(Somewhere()) is impl


def test_triton_needs_a_gpu() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    message = "x must be bf16, fp16 or fp32 on a GPU for impl triton, got torch.float32 on cpu"
    for run in (
        lambda: rms_norm(x, weight, EPS, impl="triton"),
        lambda: gated_rms_norm(x, x, weight, EPS, impl="triton"),
        lambda: residual_rms_norm(x, x, weight, EPS, impl="triton"),
    ):
        with pytest.raises(UnsupportedError, match=re.escape(message)):
            run()


def test_wrong_arguments() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"gate must have shape x's = \[2, 8\], got \[2, 4\]"):
        gated_rms_norm(x, x[:, :4], weight, EPS)
    with pytest.raises(TypeError, match=r"gate must be torch.float32, got torch.float16"):
        gated_rms_norm(x, x.half(), weight, EPS)
    with pytest.raises(ValueError, match=r"update must have shape stream's = \[2, 8\], got \[8\]"):
        residual_rms_norm(x, x[0], weight, EPS)
    with pytest.raises(ValueError, match=r"weight must have shape \[D\] = \[8\], got \[4\]"):
        gated_rms_norm(x, x, weight[:4], EPS)
    with pytest.raises(
        UnsupportedError, match="rms_norm must use impl eager, numba, triton, got 'onednn"
    ):
        rms_norm(x, weight, EPS, impl="onednn")
