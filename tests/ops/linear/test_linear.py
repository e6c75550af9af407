"""The linear layer: each product under the error rule, and the head's fp32 logits."""

import pytest
import torch
from torch.nn import functional as F

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl, head_logits, head_logits_into, linear, room_for_logits
from sevenfold.ops.linear import api, default_linear_impl, mkl, onednn, weight_product
from sevenfold.ops.testing import check_error

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="PyTorch without oneDNN")
LEADS = [(), (1,), (7,), (2, 3), (2, 1, 5)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)


def with_grads(x: torch.Tensor, weight: torch.Tensor, impl: str | None) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight, impl=impl)
    dy = random(*y.shape, dtype=y.dtype, seed=2)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


@needs_onednn
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (5, 3), (64, 48)])
def test_onednn_keeps_the_error_rule(K: int, N: int, lead: tuple[int, ...]) -> None:
    x, weight = random(*lead, K), random(N, K, seed=1)
    found, honest = (with_grads(x, weight, impl) for impl in ("onednn", "eager"))
    exact = with_grads(x.double(), weight.double(), "eager")
    for name, *three in zip(("y", "dx", "dweight"), found, honest, exact, strict=True):
        check_error(name, *three)


@needs_onednn
@pytest.mark.parametrize("impl", [None, "eager", "onednn"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
def test_no_rows(lead: tuple[int, ...], impl: str | None) -> None:
    y, dx, dweight = with_grads(random(*lead, 4), random(3, 4), impl)
    assert (y.shape, dx.shape) == ((*lead, 3), (*lead, 4))
    assert torch.equal(dweight, torch.zeros(3, 4))


@needs_onednn
def test_transposed_and_expanded_operands() -> None:
    x, weight = random(4, 6).t(), random(4, 5, seed=1).t()
    exact = x.double() @ weight.double().t()
    check_error("y", linear(x, weight, impl="onednn"), linear(x, weight, impl="eager"), exact)
    x = random(6, 4).requires_grad_()
    linear(x, weight, impl="onednn").sum().backward()  # dy is one number, expanded
    rows = weight.double().sum(0).expand(6, 4)
    check_error("dx", x.grad, weight.sum(0).expand(6, 4), rows)


@needs_onednn
@pytest.mark.parametrize("impl", ["onednn", "numba"])
@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_the_gradients_that_are_wanted(wants: tuple[bool, bool], impl: str) -> None:
    x, weight = random(3, 4), random(5, 4, seed=1)
    _, *both = with_grads(x, weight, impl)
    x.requires_grad_(wants[0])
    weight.requires_grad_(wants[1])
    y = linear(x, weight, impl=impl)
    assert y.requires_grad == any(wants)
    if any(wants):
        y.backward(random(3, 5, seed=2))
    for leaf, wanted, expected in zip((x, weight), wants, both, strict=True):
        assert torch.equal(leaf.grad, expected) if wanted else leaf.grad is None


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(3, 4).bfloat16(), random(5, 4).bfloat16()),
        (random(3, 4).double(), random(5, 4).double()),
        (random(3, 4).to("meta"), random(5, 4).to("meta")),
        (random(0, 4), random(5, 4)),
    ],
)
def test_eager_is_the_default_elsewhere(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert default_linear_impl(x, weight) is Impl.EAGER


def test_onednn_is_the_default_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl, "FASTEST", False)
    monkeypatch.setattr(onednn, "AVAILABLE", True)
    assert default_linear_impl(random(9, 4), random(5, 4)) is Impl.ONEDNN
    assert default_linear_impl(random(1, 4).requires_grad_(), random(5, 4)) is Impl.ONEDNN
    x, weight = torch.empty(2**10, 2**7), torch.empty(2**7, 2**7)
    assert default_linear_impl(x, weight) is Impl.ONEDNN
    weight.requires_grad_()
    assert default_linear_impl(x[1:], weight) is Impl.ONEDNN
    assert default_linear_impl(x, weight) is Impl.NUMBA
    x, weight = torch.empty(2**10, 1), torch.empty(2**13, 1)  # a result of 32 MB
    assert default_linear_impl(x[1:], weight) is Impl.ONEDNN
    assert default_linear_impl(x, weight) is Impl.NUMBA
    with torch.autocast("cpu", torch.bfloat16):
        assert default_linear_impl(random(9, 4), random(5, 4)) is Impl.EAGER
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    assert default_linear_impl(random(9, 4), random(5, 4)) is Impl.EAGER


def test_eager_is_the_default_where_mkl_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl, "FASTEST", True)
    monkeypatch.setattr(onednn, "AVAILABLE", True)
    assert default_linear_impl(random(9, 4), random(5, 4)) is Impl.EAGER
    x, weight = torch.empty(2**10, 2**7), torch.empty(2**7, 2**7).requires_grad_()
    assert default_linear_impl(x, weight) is Impl.EAGER
    x, weight = torch.empty(2**10, 1), torch.empty(2**13, 1)  # a result of 32 MB
    assert default_linear_impl(x, weight) is Impl.EAGER
    with torch.inference_mode():
        assert default_linear_impl(random(8, 4), random(5, 4)) is Impl.NUMBA


@needs_onednn
@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4, 4), (8, 4)])
def test_numba_is_the_default_for_a_few_rows_in_inference(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mkl, "FASTEST", False)
    x, weight = random(*shape), random(5, 4, seed=1)
    with torch.inference_mode():
        assert default_linear_impl(x, weight) is Impl.NUMBA
        assert torch.equal(linear(x, weight), linear(x, weight, impl="numba"))
        with torch.autocast("cpu", torch.bfloat16):
            assert default_linear_impl(x, weight) is Impl.EAGER
    with torch.no_grad():
        assert default_linear_impl(x, weight) is Impl.ONEDNN


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (5, 3), (64, 48)])
def test_numba_keeps_the_error_rule(K: int, N: int, lead: tuple[int, ...]) -> None:
    x, weight = random(*lead, K), random(N, K, seed=1)
    exact = F.linear(x.double(), weight.double())
    check_error("y", linear(x, weight, impl="numba"), F.linear(x, weight), exact)
    strided = weight.t().contiguous().t()
    assert torch.equal(linear(x, strided, impl="numba"), linear(x, weight, impl="numba"))


@pytest.mark.parametrize("lead", [(), (7,), (3, 43)])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (5, 3), (64, 96)])
def test_numba_keeps_the_error_rule_with_its_gradients(
    K: int, N: int, lead: tuple[int, ...]
) -> None:
    x, weight = random(*lead, K), random(N, K, seed=1)
    found, honest = (with_grads(x, weight, impl) for impl in ("numba", "eager"))
    exact = with_grads(x.double(), weight.double(), "eager")
    for name, *three in zip(("y", "dx", "dweight"), found, honest, exact, strict=True):
        check_error(name, *three)


@needs_onednn
def test_none_takes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl, "FASTEST", False)
    x, weight = random(37, 65), random(53, 65, seed=1)
    assert torch.equal(linear(x, weight), linear(x, weight, impl="onednn"))
    low = (x.bfloat16(), weight.bfloat16())
    assert torch.equal(linear(*low), F.linear(*low))


def test_autocast_decides_the_product() -> None:
    x, weight = random(7, 5), random(3, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.float64, torch.float64, r"x must be torch.float32, got torch.float64"),
        (torch.bfloat16, torch.float32, r"x must be torch.float32, got torch.bfloat16"),
        (torch.float32, torch.bfloat16, r"weight must be torch.float32, got torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("impl", ["onednn", "numba"])
def test_fp32_products_refuse_other_dtypes(
    impl: str, x: torch.dtype, weight: torch.dtype, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        linear(random(2, 3).to(x), random(4, 3).to(weight), impl=impl)


def test_impl_names() -> None:
    with pytest.raises(ValueError, match=r"impl must be one of .*, got 'mkl'"):
        linear(random(2, 3), random(4, 3), impl="mkl")
    with pytest.raises(UnsupportedError, match="linear must use impl eager, onednn, numba"):
        linear(random(2, 3), random(4, 3), impl="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_accumulates_low_precision_in_fp32(dtype: torch.dtype) -> None:
    hidden, weight = random(3, 5, 512, dtype=dtype), random(7, 512, dtype=dtype, seed=1)
    logits = head_logits(hidden, weight)
    exact = hidden.double() @ weight.double().t()
    assert logits.dtype == torch.float32
    check_error("logits", logits, F.linear(hidden.float(), weight.float()), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_head_is_a_plain_product_otherwise(dtype: torch.dtype) -> None:
    hidden, weight = random(3, 5, 8, dtype=dtype), random(7, 8, dtype=dtype, seed=1)
    assert torch.equal(head_logits(hidden, weight), linear(hidden, weight))
    assert head_logits(hidden, weight).dtype == dtype


def test_head_takes_gradients_in_bf16() -> None:
    hidden = random(3, 8, dtype=torch.bfloat16).requires_grad_()
    weight = random(5, 8, dtype=torch.bfloat16, seed=1).requires_grad_()
    dz = random(3, 5, seed=2)
    dhidden, dweight = torch.autograd.grad(head_logits(hidden, weight), (hidden, weight), dz)
    exact = dz.double() @ weight.detach().double()
    check_error("dhidden", dhidden, dz.bfloat16() @ weight.detach(), exact)
    exact = dz.double().t() @ hidden.detach().double()
    check_error("dweight", dweight, dz.bfloat16().t() @ hidden.detach(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_returns_fp32_under_autocast(dtype: torch.dtype) -> None:
    hidden, weight = random(3, 64, dtype=dtype), random(7, 64, dtype=dtype, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    check_error(
        "logits", logits, head_logits(hidden, weight), hidden.double() @ weight.double().t()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(3, 8), (8, 3), (5, 5), (1, 4), (4, 1)])
def test_weight_product_in_fp32_whichever_size_is_smaller(
    N: int, K: int, dtype: torch.dtype
) -> None:
    dy, x = random(40, N, dtype=dtype), random(40, K, dtype=dtype, seed=1)
    exact = dy.double().t() @ x.double()
    found = weight_product(dy, x)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    assert found.is_contiguous() or found.t().is_contiguous()
    check_error("dweight", found, dy.to(wide).t() @ x.to(wide), exact)
    assert torch.equal(weight_product(dy[:0], x[:0]), torch.zeros(N, K, dtype=wide))


def test_room_for_large_logits_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = random(3, 5, 40), random(64, 40, seed=1)
    monkeypatch.setattr(api, "_LARGE_ELEMENTS", 15 * 64)
    with torch.no_grad():
        room = room_for_logits(15, weight)
        assert room.shape == (15, 64)
        logits = head_logits_into(room, hidden, weight)
        assert logits.data_ptr() == room.data_ptr()
        check_error(
            "logits", logits, F.linear(hidden, weight), F.linear(hidden.double(), weight.double())
        )
        assert room_for_logits(14, weight) is None
        for other in (weight.double(), weight.bfloat16(), weight.to("meta")):
            assert room_for_logits(15, other) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert room_for_logits(15, weight) is None
    assert room_for_logits(15, weight) is None  # a gradient may be wanted
