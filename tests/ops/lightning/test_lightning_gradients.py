"""Gradients: finite differences, autograd through the reference, and the error rule."""

from collections.abc import Sequence

import pytest
import torch
from lightning_statements import DECAYS, Inputs, borders, dense, make_inputs
from torch import Tensor

from sevenfold.ops import lightning_attention, lightning_attention_step
from sevenfold.ops.testing import check_error

NAMES = ("dq", "dk", "dv", "dinitial_state")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_like(outputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """Random output gradients that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]


def run(x: Inputs, impl: str, lengths: Sequence[int] | None, scale: float):
    """o, final_state and the gradients of q, k, v and initial_state."""
    q, k, v, state = leaves = x.leaves()
    if impl == "dense":
        moved = Inputs(q, k, v, x.log_decay, state)
        outputs = list(dense(moved, scale=scale, lengths=lengths))
    else:
        cu_seqlens = None if lengths is None else borders(lengths)
        options = {"initial_state": state, "return_final_state": True, "cu_seqlens": cu_seqlens}
        outputs = list(lightning_attention(q, k, v, x.log_decay, scale=scale, impl=impl, **options))
    grads = torch.autograd.grad(outputs, leaves, weights_like(outputs))
    return [o.detach() for o in outputs], grads


def check_grads(x: Inputs, lengths: Sequence[int] | None = None, scale: float = 1.0) -> None:
    exact_o, exact = run(x.to(torch.float64), "dense", lengths, scale)
    honest_o, honest = run(x, "reference", lengths, scale)
    found_o, found = run(x, "eager", lengths, scale)
    check_error("o", found_o[0], honest_o[0], exact_o[0])
    check_error("final_state", found_o[1], honest_o[1], exact_o[1])
    for name, *three in zip(NAMES, found, honest, exact, strict=True):
        assert three[0].dtype == three[1].dtype
        check_error(name, *three)


@pytest.mark.parametrize("which", ["o", "final_state", "both"])
def test_gradcheck_packed_with_empty_and_one_token_documents(which: str) -> None:
    x = make_inputs([-0.7, -5e-5], 6, N=4, K=2, V=1)

    def op(q, k, v, state):
        result = lightning_attention(
            *(q, k, v, x.log_decay),
            scale=0.5,
            initial_state=state,
            return_final_state=True,
            cu_seqlens=borders([0, 1, 5, 0]),
        )
        return tuple(result) if which == "both" else getattr(result, which)

    assert torch.autograd.gradcheck(op, x.leaves())


def test_gradcheck_across_chunks() -> None:
    x = make_inputs([-0.02], 66, K=1, V=1)

    def op(q, k, v, state):
        options = {"initial_state": state, "return_final_state": True}
        return tuple(lightning_attention(q, k, v, x.log_decay, **options))

    assert torch.autograd.gradcheck(op, x.leaves(), fast_mode=True)


def test_gradcheck_of_the_step() -> None:
    x = make_inputs([-0.7, 0.0], 1, B=2)

    def op(q, k, v, state):
        tokens = (y[:, 0] for y in (q, k, v))
        return tuple(lightning_attention_step(*tokens, x.log_decay, state, scale=2.0))

    assert torch.autograd.gradcheck(op, x.leaves())


@pytest.mark.parametrize("T", [1, 64, 65, 130])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_agree_with_the_dense_statement_in_fp64(decay: str, T: int) -> None:
    check_grads(make_inputs(decay, T, B=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_error_rule_in_training_dtypes(decay: str, dtype: torch.dtype) -> None:
    check_grads(make_inputs(decay, 130, K=4, V=4, dtype=dtype))


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (-2.0, torch.float32),
        (-2.0, torch.bfloat16),
        (-2.0, torch.float16),
        (0.3, torch.float32),
        (0.3, torch.bfloat16),
        (0.3, torch.float16),
    ],
)
def test_error_rule_with_a_scale(scale: float, dtype: torch.dtype) -> None:
    check_grads(make_inputs("mixed", 70, B=2, dtype=dtype), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("lengths", [(0, 1, 64, 0, 66, 2, 0), (1, 1, 1, 63)])
def test_error_rule_of_packed_documents(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_inputs("mixed", sum(lengths), N=len(lengths), dtype=dtype)
    check_grads(x, lengths)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, -5e-5, DECAYS["last"][-1]])
def test_error_rule_across_blocks(rate: float, dtype: torch.dtype) -> None:
    check_grads(make_inputs([rate], 1090, dtype=dtype))


def test_error_rule_across_blocks_of_packed_documents() -> None:
    lengths = (3, 1000, 0, 90)
    x = make_inputs([-5e-5], sum(lengths), N=4, dtype=torch.float32)
    check_grads(x, lengths)


def test_final_state_may_go_without_a_gradient() -> None:
    x = make_inputs("mixed", 70)
    q, k, v, state = leaves = x.leaves()
    options = {"initial_state": state, "return_final_state": True}
    with_final = lightning_attention(q, k, v, x.log_decay, **options)
    (do,) = weights_like([with_final.o])
    found = torch.autograd.grad(with_final.o, leaves, do)
    zero = torch.zeros_like(with_final.final_state)
    again = lightning_attention(q, k, v, x.log_decay, **options)
    expected = torch.autograd.grad(tuple(again), leaves, (do, zero))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("only", [0, 1, 2, 3])
def test_one_input_alone_may_require_a_gradient(only: int) -> None:
    x = make_inputs("mixed", 70)
    together, alone = x.leaves(), [y.detach() for y in x.leaves()]
    alone[only].requires_grad_()

    def loss(q, k, v, state):
        return lightning_attention(q, k, v, x.log_decay, initial_state=state).o.square().sum()

    expected = torch.autograd.grad(loss(*together), together)[only]
    assert torch.equal(torch.autograd.grad(loss(*alone), alone[only])[0], expected)


def test_no_gradient_reaches_past_a_document() -> None:
    x = make_inputs("mixed", 9, N=3)
    q, k, v, state = leaves = x.leaves()
    options = {"initial_state": state, "cu_seqlens": borders([3, 4, 2])}
    o = lightning_attention(q, k, v, x.log_decay, **options).o
    for grad in torch.autograd.grad(o[:, 3:7].square().sum(), leaves[:3]):
        assert bool((grad[:, 3:7] != 0).all())
        assert torch.equal(grad[:, :3], torch.zeros_like(grad[:, :3]))
        assert torch.equal(grad[:, 7:], torch.zeros_like(grad[:, 7:]))
