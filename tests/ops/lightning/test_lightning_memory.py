"""What is read, what is saved, and what autocast leaves alone."""

import pytest
import torch
from lightning_statements import Inputs, borders, dense, make_inputs
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sevenfold.ops import lightning_attention, lightning_attention_step
from sevenfold.ops.testing import check_error, poisoned_allocations


def forward_and_backward(
    x: Inputs, impl: str = "eager", lengths=None, cast: bool = False
) -> list[Tensor]:
    q, k, v, state = leaves = x.leaves()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        result = lightning_attention(
            *(q, k, v, x.log_decay),
            initial_state=state,
            return_final_state=True,
            cu_seqlens=None if lengths is None else borders(lengths),
            impl=impl,
        )
    ones = [torch.ones_like(y) for y in result]
    return [y.detach() for y in result] + list(torch.autograd.grad(tuple(result), leaves, ones))


@pytest.mark.parametrize(
    "lengths", [(64,), (65,), (1,), (0, 3, 0), (0,), (64, 63, 0, 130, 1), (1024, 1)]
)
def test_nothing_is_read_before_it_is_written(lengths: tuple[int, ...]) -> None:
    x = make_inputs([-5e-5, -0.9], sum(lengths), N=len(lengths), dtype=torch.float32)
    expected = forward_and_backward(x, lengths=lengths)
    with poisoned_allocations():
        found = forward_and_backward(x, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(bool(y.isfinite().all()) for y in found)


def test_the_step_reads_nothing_unwritten() -> None:
    x = make_inputs("mixed", 1, B=2, dtype=torch.bfloat16)
    arguments = (*(y[:, 0] for y in x[:3]), x.log_decay, x.initial_state)
    expected = lightning_attention_step(*arguments)
    with poisoned_allocations():
        found = lightning_attention_step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def saved_storages(x: Inputs, leaves: list[Tensor], dtype: torch.dtype) -> dict[int, int]:
    """Address and bytes of each storage that the forward keeps for the backward."""
    saved: dict[int, int] = {}

    def pack(y: Tensor) -> Tensor:
        saved[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with saved_tensors_hooks(pack, lambda y: y):
        q, k, v, state = leaves
        lightning_attention(q, k, v, x.log_decay, initial_state=state, scale=0.5)
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_the_inputs_only(dtype: torch.dtype) -> None:
    x = make_inputs("mixed", 1090, K=4, V=4, dtype=dtype)
    leaves = x.leaves()
    inputs = [*leaves, x.log_decay]
    expected = {y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in inputs}
    assert saved_storages(x, leaves, dtype) == expected


def test_nothing_is_kept_without_a_gradient() -> None:
    x = make_inputs("mixed", 70, dtype=torch.float32)
    with torch.no_grad():
        assert saved_storages(x, x.leaves(), torch.float32) == {}


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_autocast_rounds_nothing(impl: str) -> None:
    x = make_inputs("mixed", 70, B=2, dtype=torch.float32)
    expected = forward_and_backward(x, impl)
    found = forward_and_backward(x, impl, cast=True)
    assert all(a.dtype == torch.float32 for a in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_autocast_does_not_round_the_step(impl: str) -> None:
    x = make_inputs("mixed", 1, B=2, K=8, dtype=torch.float32)
    x = x._replace(initial_state=torch.randn(x.initial_state.shape, generator=generator()))
    arguments = (*(y[:, 0] for y in x[:3]), x.log_decay, x.initial_state)
    expected = lightning_attention_step(*arguments, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        found = lightning_attention_step(*arguments, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_the_state_of_low_precision_tokens_is_not_rounded(impl: str) -> None:
    x = make_inputs([-5e-5], 130, dtype=torch.bfloat16)
    options = {"initial_state": x.initial_state, "return_final_state": True, "impl": impl}
    state = lightning_attention(*x[:4], **options).final_state
    same_in_fp32 = lightning_attention(*x.to(torch.float32)[:4], **options).final_state
    exact = dense(x.to(torch.float64))[1]
    assert state.dtype == torch.float32
    check_error("final_state", state, same_in_fp32, exact)
