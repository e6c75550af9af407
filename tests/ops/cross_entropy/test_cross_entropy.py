"""Cross-entropy of a linear head: three statements agree, and the logits never exist whole."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.config import UnsupportedError
from sevenfold.ops import IGNORED_LABEL, Impl, head_logits, linear_cross_entropy
from sevenfold.ops.cross_entropy import compiled, default_cross_entropy_impl, eager
from sevenfold.ops.testing import check_error, poisoned_allocations

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VOCAB, D = 11, 6


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", {"cpu": 4 * VOCAB + 3})
    monkeypatch.setattr(compiled, "_CHUNK_ELEMENTS", 4 * VOCAB + 3)


def inputs(T: int, dtype: torch.dtype = torch.float64, ignored: bool = True):
    generator = torch.Generator().manual_seed(T)
    hidden, weight = (
        torch.randn(shape, generator=generator).bfloat16().to(dtype)
        for shape in ((T, D), (VOCAB, D))
    )
    labels = torch.randint(VOCAB, (T,), generator=generator)
    if ignored:
        labels[::3] = IGNORED_LABEL
    return hidden, weight, labels


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


def naive_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    counted = labels != IGNORED_LABEL
    odds = (hidden[counted, None] * weight).sum(-1).exp()
    chosen = odds.gather(1, labels[counted, None]).squeeze(1)
    return (odds.sum(-1) / chosen).log().sum()


def with_grads(run, hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = run(hidden, weight, labels)
    return [loss.detach(), *torch.autograd.grad(loss * factor, (hidden, weight))]


def by(impl: str):
    return lambda *arguments: linear_cross_entropy(*arguments, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 9, 30])
def test_statements_agree_across_chunk_borders(T: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(T, dtype)
    exact = with_grads(torch_loss, hidden.double(), weight.double(), labels)
    honest = with_grads(by("reference"), hidden, weight, labels)
    if dtype == torch.float64:
        honest = with_grads(naive_loss, hidden, weight, labels)
    for impl in ("eager", "reference", *(["numba"] if dtype == torch.float32 else [])):
        found = with_grads(by(impl), hidden, weight, labels)
        assert found[0].dtype == torch.promote_types(dtype, torch.float32)
        for name, *three in zip(("loss", "dhidden", "dweight"), found, honest, exact, strict=True):
            check_error(f"{impl} {name}", *three)


@pytest.mark.parametrize("impl", ["reference", "eager", "numba"])
def test_a_hand_worked_loss(impl: str) -> None:
    dtype = torch.float32 if impl == "numba" else torch.float64
    weight = torch.tensor([[0.0], [1.0], [2.0]], dtype=dtype)
    hidden = torch.tensor([[0.0], [-1.0]], dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([2, 1]), impl=impl)
    # ln 3, and ln(1 + e^-1 + e^-2) + 1
    assert f"{loss.item():.6f}" == "2.506218"


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradcheck(impl: str) -> None:
    hidden, weight, labels = inputs(9)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: by(impl)(h, w, labels), leaves)


@pytest.mark.parametrize(
    ("impl", "T"), [("reference", 0), ("eager", 0), ("reference", 9), ("eager", 9), ("numba", 9)]
)
def test_all_ignored(T: int, impl: str) -> None:
    hidden, weight, _ = inputs(T, torch.float32)
    labels = torch.full((T,), IGNORED_LABEL)
    found = with_grads(by(impl), hidden, weight, labels)
    assert found[0] == 0
    assert not any(grad.any() for grad in found[1:])


@pytest.mark.parametrize("impl", ["reference", "eager", "numba"])
def test_ignored_tokens_take_no_part(impl: str) -> None:
    hidden, weight, labels = inputs(9, torch.float32)
    other = hidden.clone()
    other[labels == IGNORED_LABEL] = 50.0
    first, second = (with_grads(by(impl), h, weight, labels) for h in (hidden, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first[1][labels == IGNORED_LABEL].any()


@pytest.mark.parametrize("impl", ["reference", "eager", "numba"])
def test_leading_dimensions_are_tokens(impl: str) -> None:
    hidden, weight, labels = inputs(12, torch.float32)
    flat = with_grads(by(impl), hidden, weight, labels)
    shaped = with_grads(by(impl), hidden.view(3, 4, D), weight, labels.view(3, 4))
    assert torch.equal(flat[0], shaped[0])
    assert torch.equal(flat[1].view(3, 4, D), shaped[1])
    assert torch.equal(flat[2], shaped[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_only_the_wanted_gradients(wants: tuple[bool, bool], dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(9, dtype)
    loss, *both = with_grads(linear_cross_entropy, hidden, weight, labels)
    if not any(wants):
        loss = linear_cross_entropy(hidden, weight, labels)
    hidden.requires_grad_(wants[0])
    weight.requires_grad_(wants[1])
    found = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(found.detach(), loss)
    assert found.requires_grad == any(wants)
    if any(wants):
        found.backward()
    for leaf, wanted, expected in zip((hidden, weight), wants, both, strict=True):
        assert torch.equal(leaf.grad, expected) if wanted else leaf.grad is None


def test_no_gradient_is_taken_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(9)
    expected = linear_cross_entropy(hidden, weight, labels)
    monkeypatch.setattr(eager, "linear", None)  # the gradients' products
    monkeypatch.setattr(eager, "weight_product", None)
    with torch.no_grad():
        found = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_gradients_carry_the_outer_factor() -> None:
    hidden, weight, labels = inputs(9)
    once = with_grads(by("eager"), hidden, weight, labels)
    twice = with_grads(by("eager"), hidden, weight, labels, factor=-0.5)
    assert all(torch.equal(-0.5 * a, b) for a, b in zip(once[1:], twice[1:], strict=True))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (torch.bfloat16, 1 / 3),
        (torch.float16, 1 / 3),
        (torch.bfloat16, 2.0**-20),
        (torch.float16, 2.0**17),
    ],
)
def test_error_rule_under_a_loss_scale(dtype: torch.dtype, factor: float) -> None:
    hidden, weight, labels = inputs(9, dtype)
    weight = weight / 16  # keeps the scaled gradients in fp16's range
    exact = with_grads(torch_loss, hidden.double(), weight.double(), labels, factor)
    honest = with_grads(by("reference"), hidden, weight, labels, factor)
    found = with_grads(by("eager"), hidden, weight, labels, factor)
    check_error("dhidden", found[1], honest[1], exact[1])


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(30)
    shapes = []

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((a.shape[0], b.shape[0]))
        return head_logits(a, b)

    monkeypatch.setattr(eager, "head_logits", recorded)
    with_grads(by("eager"), hidden, weight, labels)
    assert shapes == [*[(4, VOCAB)] * 7, (2, VOCAB)]


@pytest.mark.parametrize(
    ("vocab_size", "tokens"),
    [(VOCAB, 4), (4 * VOCAB + 3, 1), (4 * VOCAB + 4, 1), (1, 4 * VOCAB + 3)],
)
def test_a_chunk_has_as_many_tokens_as_fit_and_one_at_least(vocab_size: int, tokens: int) -> None:
    assert eager.chunk_tokens(vocab_size, torch.device("cpu")) == tokens


def test_a_chunk_takes_8_mb_on_a_cpu_and_1_gb_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for device, size in (("cpu", 2**23), ("cuda", 2**30)):
        assert eager.chunk_tokens(2**16, torch.device(device)) * 2**16 * 4 == size


@pytest.mark.parametrize("impl", ["eager", "numba"])
def test_nothing_is_read_unwritten(impl: str) -> None:
    hidden, weight, labels = inputs(9, torch.float32)
    expected = with_grads(by(impl), hidden, weight, labels)
    with poisoned_allocations():
        found = with_grads(by(impl), hidden, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_autocast_rounds_the_operands_and_not_the_loss(impl: str) -> None:
    hidden, weight, labels = inputs(9, torch.float32)
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels, impl=impl)
    assert found.dtype == torch.float32
    assert torch.equal(found, low)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[1e4], [-1e4]])
    found = with_grads(by("eager"), hidden, weight, torch.tensor([0, 0]))
    assert found[0] == 2e4
    assert all(bool(grad.isfinite().all()) for grad in found[1:])


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"weight": torch.zeros(VOCAB, 5)}, "weight must have shape [vocab_size, D]"),
        (ValueError, {"labels": torch.zeros(4).long()}, "labels must have shape hidden's without"),
        (TypeError, {"weight": torch.zeros(VOCAB, D).half()}, "weight must be torch.float64, got"),
        (ValueError, {"impl": "fused"}, "impl must be one of"),
        (UnsupportedError, {"impl": "onednn"}, "linear_cross_entropy must use impl reference, ea"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_arguments(error: type[Exception], changes: dict, message: str) -> None:
    arguments = dict(zip(("hidden", "weight", "labels"), inputs(3), strict=True)) | changes
    with pytest.raises(error, match=re.escape(message)):
        linear_cross_entropy(**arguments)


def test_labels_of_another_dtype() -> None:
    hidden, weight, labels = inputs(3)
    with pytest.raises(TypeError, match=r"labels must be torch.int64, got torch.int32"):
        linear_cross_entropy(hidden, weight, labels.int())


def test_numba_is_the_default_where_a_gradient_is_needed_in_fp32() -> None:
    hidden, weight, labels = inputs(9, torch.float32)
    assert default_cross_entropy_impl(hidden, weight) is Impl.EAGER
    assert default_cross_entropy_impl(hidden.bfloat16().requires_grad_(), weight) is Impl.EAGER
    weight.requires_grad_()
    assert default_cross_entropy_impl(hidden, weight) is Impl.NUMBA
    assert torch.equal(
        linear_cross_entropy(hidden, weight, labels), by("numba")(hidden, weight, labels)
    )
    with torch.no_grad():
        assert default_cross_entropy_impl(hidden, weight) is Impl.EAGER
    with pytest.raises(UnsupportedError, match="hidden must be fp32 on a CPU"):
        by("numba")(hidden.double(), weight.double(), labels)


def test_the_same_bits_with_any_number_of_threads() -> None:
    hidden, weight, labels = inputs(30, torch.float32)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(with_grads(by("numba"), hidden, weight, labels))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
