"""Independent statements of the mathematics and both implementations say the same, in fp64."""

import pytest
import torch
from lightning_statements import (
    DECAYS,
    Inputs,
    borders,
    dense,
    make_inputs,
    recurrence,
    rounding_bound,
)

from sevenfold.ops import lightning_attention
from sevenfold.ops.testing import check_error

IMPLS = ["reference", "eager"]
LENGTHS = [0, 1, 2, 63, 64, 65, 130]
LONG = 1090  # more than one block of 1,024 tokens


def run(x: Inputs, impl: str, **options):
    return lightning_attention(
        *x[:4], initial_state=x.initial_state, return_final_state=True, impl=impl, **options
    )


def check_all(x: Inputs, impl: str, scale: float = 1.0) -> None:
    exact, honest, found = (
        dense(x, scale=scale),
        recurrence(x, scale=scale),
        run(x, impl, scale=scale),
    )
    check_error("o", found.o, honest[0], exact[0])
    check_error("final_state", found.final_state, honest[1], exact[1])


def test_dense_statement_on_hand_worked_tokens() -> None:
    half = -torch.log(torch.tensor([2.0]))
    one = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    v = torch.tensor([8.0, 16.0, 32.0], dtype=torch.float64).view(1, 3, 1, 1)
    x = Inputs(one, one, v, half, torch.full((1, 1, 1, 1), 64.0, dtype=torch.float64))
    # States: 64/2 + 8 = 40, 40/2 + 16 = 36, 36/2 + 32 = 50.
    for o, final in (dense(x, scale=0.5), recurrence(x, scale=0.5), run(x, "eager", scale=0.5)):
        assert [round(y, 4) for y in o.flatten().tolist()] == [20, 18, 25]
        assert round(final.item(), 4) == 50


@pytest.mark.parametrize("T", [*LENGTHS, LONG])
@pytest.mark.parametrize("decay", DECAYS)
def test_the_two_statements_differ_by_rounding_only(decay: str, T: int) -> None:
    x = make_inputs(decay, T)
    pairs = zip(dense(x), recurrence(x), rounding_bound(x), strict=True)
    assert all(bool(((a - b).abs() <= bound).all()) for a, b, bound in pairs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_implementations_agree_with_the_statements(decay: str, T: int, impl: str) -> None:
    check_all(make_inputs(decay, T, B=2), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", ["zero", "5e-5", "middle", "last", "fast"])
def test_agreement_across_blocks(decay: str, impl: str) -> None:
    rates = DECAYS[decay][-1:]
    check_all(make_inputs(rates, LONG, V=1), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("H", "K", "V"), [(1, 1, 1), (1, 5, 2), (3, 2, 7), (6, 4, 4)])
@pytest.mark.parametrize("scale", [1.0, 0.25, -3.0])
def test_agreement_for_any_heads_widths_and_scale(
    H: int, K: int, V: int, scale: float, impl: str
) -> None:
    rates = [-0.5 * h / H for h in range(H)]
    check_all(make_inputs(rates, 70, B=2, K=K, V=V, seed=H), impl, scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_initial_state_means_zeros(impl: str) -> None:
    x = make_inputs("mixed", 70, B=2)
    zero = run(x._replace(initial_state=torch.zeros_like(x.initial_state)), impl)
    none = lightning_attention(*x[:4], return_final_state=True, impl=impl)
    assert torch.equal(none.o, zero.o)
    assert torch.equal(none.final_state, zero.final_state)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(0, 1, 64, 0, 65, 2, 0), (130,), (0,), (1, 1, 1, 63)])
def test_packed_documents_agree_with_the_dense_statement(
    lengths: tuple[int, ...], impl: str
) -> None:
    x = make_inputs("mixed", sum(lengths), N=len(lengths))
    found, exact = run(x, impl, cu_seqlens=borders(lengths)), dense(x, lengths=lengths)
    honest = run(x, "reference", cu_seqlens=borders(lengths))
    check_error("o", found.o, honest.o, exact[0])
    check_error("final_state", found.final_state, honest.final_state, exact[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fastest_decays_leave_the_current_token_alone(impl: str, dtype: torch.dtype) -> None:
    x = make_inputs([-1e4, -3e38], 70, dtype=dtype)
    found = run(x, impl)
    own = (x.q.float() * x.k.float()).sum(-1, keepdim=True) * x.v.float()
    check_error("o", found.o, own.to(dtype), dense(x.to(torch.float64))[0])
    outer = x.k[:, -1, :, :, None].float() * x.v[:, -1, :, None].float()
    assert torch.equal(found.final_state, outer)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_a_head_that_forgets_everything_at_once(impl: str) -> None:
    x = make_inputs([float("-inf")], 70)
    own = (x.q * x.k).sum(-1, keepdim=True) * x.v
    check_error("o", run(x, impl).o, own, own)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows_or_no_tokens(shape: tuple[int, int], impl: str) -> None:
    B, T = shape
    x = make_inputs("mixed", T, B=B)
    found = run(x, impl)
    assert found.o.shape == x.v.shape
    assert torch.equal(found.final_state, x.initial_state)
    assert lightning_attention(*x[:4], impl=impl).final_state is None


@pytest.mark.parametrize(
    ("impl", "layout"),
    [
        ("reference", "heads first"),
        ("eager", "heads first"),
        ("eager", "slices"),
        ("eager", "broadcast heads"),
    ],
)
def test_any_memory_layout_gives_the_same_bits(layout: str, impl: str) -> None:
    x = make_inputs([-0.1, -0.1], 70, B=2, K=2, V=2)

    def laid_out(y: torch.Tensor) -> torch.Tensor:
        match layout:
            case "heads first":
                return y.transpose(1, 2).contiguous().transpose(1, 2)
            case "slices":
                return torch.cat([y, y], dim=-1)[..., : y.shape[-1]]
            case _:
                return y[:, :, :1].expand_as(y)

    tokens = [laid_out(y).requires_grad_() for y in x[:3]]
    plain = [y.detach().contiguous().requires_grad_() for y in tokens]
    found = lightning_attention(*tokens, x.log_decay, impl=impl).o
    expected = lightning_attention(*plain, x.log_decay, impl=impl).o
    assert torch.equal(found, expected)
    grads = torch.autograd.grad(found.square().sum(), tokens)
    for grad, wanted in zip(
        grads, torch.autograd.grad(expected.square().sum(), plain), strict=True
    ):
        assert torch.equal(grad, wanted)
