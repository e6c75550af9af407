"""Softmax attention by numba: the error rule over blocks and windows, and what it refuses."""

import pytest
import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import Impl, attention, attention_cached
from sevenfold.ops.attention import default_attention_impl, reference
from sevenfold.ops.testing import check_error, poisoned_allocations

SCALE = 0.4


def inputs(T: int, H: int, G: int, D: int, V: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((1, T, H, D), (1, T, G, D), (1, T, G, V))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
@pytest.mark.parametrize(
    ("lengths", "H", "G", "D", "V"),
    [
        ((1,), 1, 1, 8, 32),
        ((64, 0, 63), 2, 2, 5, 32),
        ((65, 1, 129), 4, 2, 32, 64),
        ((300,), 3, 1, 64, 96),
        ((384,), 2, 1, 16, 32),
    ],
)
def test_the_error_rule(
    lengths: tuple[int, ...], H: int, G: int, D: int, V: int, window: int | None
) -> None:
    tensors = inputs(sum(lengths), H, G, D, V)
    options = {"lengths": lengths, "scale": SCALE, "window": window}
    found, honest = (attention(*tensors, **options, impl=impl) for impl in ("numba", "eager"))
    exact = attention(*(x.double() for x in tensors), **options, impl="reference")
    check_error("o", found, honest, exact)


def test_scores_of_any_size() -> None:
    q, k, v = inputs(200, 2, 1, 32)
    q *= 1e3  # weights of exactly 0 and 1
    options = {"lengths": (200,), "scale": SCALE}
    exact = attention(*(x.double() for x in (q, k, v)), **options, impl="reference")
    honest = attention(q, k, v, **options, impl="eager")
    check_error("o", attention(q, k, v, **options, impl="numba"), honest, exact)


def test_a_query_that_is_no_number_stays_in_its_token() -> None:
    q, k, v = inputs(100, 2, 1, 32)
    before = attention(q, k, v, lengths=(100,), scale=SCALE, impl="numba")
    q[0, 40, 1] = torch.nan
    after = attention(q, k, v, lengths=(100,), scale=SCALE, impl="numba")
    assert after[0, 40, 1].isnan().all()
    after[0, 40, 1] = before[0, 40, 1]
    assert torch.equal(after, before)


def test_new_tokens_after_a_cache() -> None:
    from sevenfold.ops.attention import compiled

    q, k, v = (x[0] for x in inputs(300, 2, 1, 32))
    exact, honest = (
        reference.one_sequence(*(x.to(dtype) for x in (q[170:], k, v)), scale=SCALE, window=90)
        for dtype in (torch.float64, torch.float32)
    )
    check_error("o", compiled.one_sequence(q[170:], k, v, scale=SCALE, window=90), honest, exact)


def test_the_default() -> None:
    q, k, v = (x.expand(-1, 512, -1, -1) for x in inputs(1, 2, 1, 32))
    assert default_attention_impl(q, k, v, (512,)) is Impl.NUMBA
    assert default_attention_impl(q, k, v, (511, 1)) is Impl.EAGER
    for other in ((q.double(), k.double(), v.double()), (q, k, v[..., :31])):
        assert default_attention_impl(*other, (512,)) is Impl.EAGER
    q = q.clone().requires_grad_()
    assert default_attention_impl(q, k, v, (512,)) is Impl.NUMBA
    assert default_attention_impl(q[..., :31], k[..., :31], v, (512,)) is Impl.EAGER


def test_what_it_cannot_do_is_refused() -> None:
    q, k, v = inputs(3, 2, 1, 32)
    options = {"lengths": (3,), "scale": SCALE, "impl": "numba"}
    with pytest.raises(UnsupportedError, match=r"q must be fp32 on a CPU, .* got torch.float64"):
        attention(q.double(), k.double(), v.double(), **options)
    with pytest.raises(UnsupportedError, match=r"V must be a multiple of 32 .* got 31"):
        attention(q, k, v[..., :31], **options)
    with pytest.raises(UnsupportedError, match=r"D must be a multiple of 32 .* got 31"):
        attention(q[..., :31].requires_grad_(), k[..., :31], v, **options)


# No window of 1 and no single token: their gradients are exactly 0, and the rule then leaves no
# room for rounding.
@pytest.mark.parametrize("window", [None, 2, 50, 128])
@pytest.mark.parametrize(
    ("lengths", "H", "G", "D", "V"),
    [((2,), 1, 1, 32, 32), ((65, 1, 129), 4, 2, 32, 64), ((300,), 3, 1, 64, 32)],
)
def test_gradients_keep_the_error_rule(
    lengths: tuple[int, ...], H: int, G: int, D: int, V: int, window: int | None
) -> None:
    tensors = inputs(sum(lengths), H, G, D, V)

    def gradients(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        o = attention(*leaves, lengths=lengths, scale=SCALE, window=window, impl=impl)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    with poisoned_allocations():
        found = gradients("numba", torch.float32)
    honest, exact = gradients("eager", torch.float32), gradients("reference", torch.float64)
    for name, *three in zip(("o", "dq", "dk", "dv"), found, honest, exact, strict=True):
        check_error(name, *three)


def test_the_same_bits_with_any_number_of_threads() -> None:
    tensors, found, threads = inputs(300, 2, 1, 32), [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        leaves = [x.clone().requires_grad_() for x in tensors]
        o = attention(*leaves, lengths=(300,), scale=SCALE, impl="numba")
        found.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("window", [None, 70])
def test_new_tokens_over_a_cache(window: int | None) -> None:
    q, k, v = (torch.cat([x, x.flip(1)]) for x in inputs(200, 4, 2, 16))
    options = {"lengths": (90, 90), "key_lengths": (200, 130), "scale": SCALE, "window": window}
    new = q[:, -90:]
    found, honest = (
        attention_cached(new, k, v, **options, impl=impl) for impl in ("numba", "eager")
    )
    wide = (x.double() for x in (new, k, v))
    check_error("o", found, honest, attention_cached(*wide, **options, impl="reference"))
