"""A row that is filled in part: the tokens that count, and nothing of those that do not."""

import re

import numpy as np
import pytest
import torch
from decode_cases import spread
from lightning_statements import Inputs, dense, make_inputs
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops import (
    PaddedSnapshots,
    Snapshots,
    Stop,
    lightning_attention_padded,
    lightning_attention_prefill,
    padded_cuts,
)
from sevenfold.ops.lightning.segments import Plan
from sevenfold.ops.testing import check_error

T = 70


def plan_of(num_tokens: int, stops: tuple[Stop, ...], q: Tensor) -> Plan:
    H, K = q.shape[2:]
    cuts = padded_cuts(T, (H, K, 3), 4, q)
    numbers = np.zeros(cuts.num_numbers, np.int64)
    cuts.write(numbers, num_tokens, stops)
    return cuts.plan(torch.from_numpy(numbers).int())


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("num_tokens", [1, 33, T - 1, T])
def test_it_is_the_prefill_of_what_counts(num_tokens: int, impl: str) -> None:
    x = make_inputs("mixed", T, dtype=torch.float32)
    stops = tuple(Stop(0, at, 4 - at % 3) for at in (1, 20, 33) if at <= num_tokens)
    pool = torch.full((6, *x.initial_state.shape[1:]), 7.0)
    wanted, apart = pool.clone(), spread(pool)
    part = [y[:, :num_tokens].clone() for y in x[:3]]
    plain = lightning_attention_prefill(
        *part,
        x.log_decay,
        Snapshots(wanted, stops),
        scale=0.5,
        initial_state=x.initial_state,
        impl=impl,
    )
    for y in x[:3]:
        y[:, num_tokens:] = float("nan")
    padded = PaddedSnapshots(apart, plan_of(num_tokens, stops, x.q))
    states, slots = spread(torch.full_like(pool, 7.0)), torch.tensor([2])
    found = lightning_attention_padded(
        *x[:4], padded, states, slots, scale=0.5, initial_state=x.initial_state, impl=impl
    )
    assert torch.equal(found[:, :num_tokens], plain.o)
    assert torch.equal(states[slots], plain.final_state)
    assert bool((states[[0, 1, 3, 4, 5]] == 7).all())
    assert torch.equal(apart, wanted)
    counted = Inputs(*part, x.log_decay, x.initial_state)
    exact = dense(counted.to(torch.float64), scale=0.5)
    check_error("o", found[:, :num_tokens], plain.o, exact[0])
    check_error("final_state", states[slots], plain.final_state, exact[1])


def test_recorded_on_zeros_it_writes_to_the_first_slot_at_most() -> None:
    x = make_inputs("mixed", T, dtype=torch.float32)
    cuts = padded_cuts(T, (4, 2, 3), 4, x.q)
    pool, states = (torch.full((6, 4, 2, 3), 7.0) for _ in range(2))
    plan = cuts.plan(torch.zeros(cuts.num_numbers, dtype=torch.int32))
    padded, slots = PaddedSnapshots(pool, plan), torch.zeros(1, dtype=torch.int64)
    found = lightning_attention_padded(*x[:4], padded, states, slots)
    assert found.shape == x.v.shape
    assert bool((pool == 7).all())
    assert bool((states[1:] == 7).all())


def test_wrong_arguments() -> None:
    x = make_inputs("mixed", T, dtype=torch.float32)
    pool, plan = torch.zeros(6, 4, 2, 3), plan_of(5, (), x.q)
    left = (pool, torch.zeros(1, dtype=torch.int64))
    two = make_inputs("mixed", T, B=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=re.escape("q must be one row [1, T, H, K], got 2 rows")):
        lightning_attention_padded(*two[:4], PaddedSnapshots(pool, plan), *left)
    with pytest.raises(ValueError, match=re.escape("pool must have shape [S, H, K, V]")):
        lightning_attention_padded(*x[:4], PaddedSnapshots(pool[:, :1], plan), *left)
    with pytest.raises(ValueError, match=re.escape("states must have shape [S, H, K, V]")):
        lightning_attention_padded(*x[:4], PaddedSnapshots(pool, plan), pool[:, :1], left[1])
    with pytest.raises(UnsupportedError, match="q must lie on a GPU for impl triton, got cpu"):
        lightning_attention_padded(*x[:4], PaddedSnapshots(pool, plan), *left, impl="triton")
