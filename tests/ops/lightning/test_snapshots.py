"""States that are kept on the way: those of the prefixes, in their slots, and every rule."""

import re

import pytest
import torch
from decode_cases import spread
from lightning_statements import Inputs, borders, dense, make_inputs
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import Snapshots, Stop, lightning_attention, lightning_attention_prefill
from sevenfold.ops.testing import check_error

LENGTHS = (70, 0, 5)
STOPS = (Stop(0, 64, 3), Stop(2, 5, 0), Stop(0, 1, 4), Stop(0, 70, 1), Stop(0, 64, 6))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Inputs, Tensor]:
    x = make_inputs("mixed", sum(LENGTHS), N=len(LENGTHS), dtype=dtype)
    pool = torch.full((7, *x.initial_state.shape[1:]), 7.0, dtype=x.initial_state.dtype)
    return x, pool


def prefill(x: Inputs, pool: Tensor, **changes):
    options = {"initial_state": x.initial_state, "cu_seqlens": borders(LENGTHS), "scale": 0.5}
    stops = changes.pop("stops", STOPS)
    return lightning_attention_prefill(*x[:4], Snapshots(pool, stops), **(options | changes))


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_slot_holds_the_state_of_its_prefix(dtype: torch.dtype, impl: str) -> None:
    x, pool = inputs(dtype)
    found = prefill(x, pool, impl=impl)
    exact = dense(x.to(torch.float64), scale=0.5, lengths=LENGTHS)
    options = {"initial_state": x.initial_state, "cu_seqlens": borders(LENGTHS), "scale": 0.5}
    honest = lightning_attention(*x[:4], **options, return_final_state=True, impl="reference")
    check_error("o", found.o, honest.o, exact[0])
    check_error("final_state", found.final_state, honest.final_state, exact[1])
    for sequence, num_tokens, slot in STOPS:
        first = sum(LENGTHS[:sequence])
        part = [y[:, first : first + num_tokens] for y in x[:3]]
        prefix = Inputs(*part, x.log_decay, x.initial_state[sequence : sequence + 1])
        state = lightning_attention(
            *part, x.log_decay, initial_state=prefix.initial_state, return_final_state=True,
            impl="reference",
        ).final_state  # fmt: skip
        check_error(f"slot {slot}", pool[slot], state[0], dense(prefix.to(torch.float64))[1][0])
    assert bool((pool[[2, 5]] == 7).all())


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_rows_and_no_initial_state(impl: str) -> None:
    x = make_inputs("mixed", 9, B=2)
    pool = torch.zeros(2, *x.initial_state.shape[1:], dtype=torch.float64)
    snapshots = Snapshots(pool, (Stop(1, 4, 0),))
    found = lightning_attention_prefill(*x[:4], snapshots, impl=impl)
    whole = lightning_attention(*x[:4], return_final_state=True, impl="reference")
    exact = dense(x._replace(initial_state=torch.zeros_like(x.initial_state)))
    check_error("o", found.o, whole.o, exact[0])
    check_error("final_state", found.final_state, whole.final_state, exact[1])
    part = [y[1:, :4] for y in x[:3]]
    state = lightning_attention(*part, x.log_decay, return_final_state=True, impl="reference")
    prefix = Inputs(*part, x.log_decay, torch.zeros_like(x.initial_state[:1]))
    check_error("slot 0", pool[:1], state.final_state, dense(prefix)[1])


def test_without_stops_it_is_lightning_attention() -> None:
    x, pool = inputs()
    options = {"initial_state": x.initial_state, "cu_seqlens": borders(LENGTHS), "scale": 0.5}
    whole = lightning_attention(*x[:4], **options, return_final_state=True)
    found = prefill(x, pool, stops=())
    exact = dense(x, scale=0.5, lengths=LENGTHS)
    check_error("o", found.o, whole.o, exact[0])
    check_error("final_state", found.final_state, whole.final_state, exact[1])
    assert bool((pool == 7).all())


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_slots_that_lie_apart(impl: str) -> None:
    x, pool = inputs()
    apart = spread(pool)
    prefill(x, apart, impl=impl)
    prefill(x, pool, impl=impl)
    assert torch.equal(apart, pool)


def test_it_takes_no_gradient() -> None:
    x, pool = inputs()
    q, k, v, state = x.leaves()
    found = prefill(Inputs(q, k, v, x.log_decay, state), pool)
    assert not found.o.requires_grad
    assert not pool.requires_grad


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ((Stop(3, 1, 0),), "sequence must lie in 0 to 2, got 3"),
        ((Stop(0, 0, 0),), "num_tokens must lie in 1 to 70, the length of sequence 0, got 0"),
        ((Stop(2, 6, 0),), "num_tokens must lie in 1 to 5, the length of sequence 2, got 6"),
        ((Stop(0, 1, 7),), "slot must differ and lie in 0 to 6, got [7]"),
        ((Stop(0, 1, 1), Stop(0, 2, 1)), "slot must differ and lie in 0 to 6, got [1, 1]"),
    ],
)
def test_wrong_stops(stops: tuple[Stop, ...], message: str) -> None:
    x, pool = inputs()
    with pytest.raises(ValueError, match=re.escape(message)):
        prefill(x, pool, stops=stops)


def test_wrong_pools() -> None:
    x, pool = inputs(torch.float32)
    with pytest.raises(ValueError, match=re.escape("pool must have shape [S, H, K, V] = [7, 4,")):
        prefill(x, pool[:, :1])
    with pytest.raises(ValueError, match="pool must be contiguous within a slot"):
        prefill(x, pool.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(TypeError, match=re.escape("pool must be torch.float32, got torch.float64")):
        prefill(x, pool.double())
    with pytest.raises(ValueError, match="pool must lie on cpu, got meta"):
        prefill(x, pool.to("meta"))


def test_the_kernels_need_a_gpu() -> None:
    x, pool = inputs(torch.float32)
    with pytest.raises(UnsupportedError, match="q must lie on a GPU for impl triton, got cpu"):
        prefill(x, pool, impl="triton")
    with pytest.raises(UnsupportedError, match="q must lie on a GPU for impl triton, got cpu"):
        lightning_attention(*x[:4], impl="triton")
