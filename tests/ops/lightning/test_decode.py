"""Decoding over a pool of states agrees with the recurrence, and touches nothing else."""

import pytest
import torch
from lightning_statements import DECAYS, make_inputs, recurrence

from sevenfold.ops import lightning_attention_decode
from sevenfold.ops.testing import check_error

IMPLS = ["reference", "eager"]


def by_recurrence(x, pool: torch.Tensor, slots: list[int], scale: float = 1.0):
    """Outputs [T, B, H, V] and the pool after T tokens of the sequences in some slots."""
    pool = pool.to(torch.promote_types(x.q.dtype, torch.float32))
    o, after = recurrence(x._replace(initial_state=pool[slots]), scale=scale)
    pool = pool.clone()
    pool[slots] = after
    return o.transpose(0, 1), pool


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_agree_with_the_recurrence(decay: str, dtype: torch.dtype, impl: str) -> None:
    x, slots = make_inputs(decay, 40, B=3, dtype=dtype), [4, 0, 2]
    H = len(x.log_decay)
    start = torch.randn(5, H, 2, 3, generator=torch.Generator().manual_seed(1))
    exact, honest = (
        by_recurrence(y, start, slots, 0.5) for y in (x.to(torch.float64), x.to(dtype))
    )
    pool, at = start.clone(), torch.tensor(slots, dtype=torch.int32)
    o = [
        lightning_attention_decode(
            x.q[:, t], x.k[:, t], x.v[:, t], x.log_decay, pool, at, scale=0.5, impl=impl
        )
        for t in range(40)
    ]
    check_error("o", torch.stack(o), honest[0].to(dtype), exact[0])
    check_error("pool", pool, honest[1], exact[1])
    assert torch.equal(pool[[1, 3]], start[[1, 3]])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_row_is_zero_and_touches_no_state(impl: str) -> None:
    x = make_inputs("mixed", 1, B=3)
    start = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    pool = start.clone()
    x.q[1] = x.k[1] = x.v[1] = float("nan")
    q, k, v = (y[:, 0] for y in x[:3])
    o = lightning_attention_decode(q, k, v, x.log_decay, pool, torch.tensor([-1, -1, 0]), impl=impl)
    assert torch.equal(o[:2], torch.zeros_like(o[:2]))
    assert torch.equal(pool[1], start[1])
    alone = start.clone()
    lone = lightning_attention_decode(
        q[2:], k[2:], v[2:], x.log_decay, alone, torch.tensor([0]), impl=impl
    )
    assert torch.equal(o[2:], lone)
    assert torch.equal(pool, alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl: str) -> None:
    x = make_inputs("mixed", 1, B=0)
    pool = torch.ones(2, 4, 2, 3, dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.int32)
    o = lightning_attention_decode(*(y[:, 0] for y in x[:3]), x.log_decay, pool, none, impl=impl)
    assert o.shape == (0, 4, 3)
    assert bool((pool == 1).all())


def test_any_memory_layout_gives_the_same_bits() -> None:
    x = make_inputs("mixed", 1, B=2, V=2)
    tokens = torch.cat([y[:, 0] for y in x[:3]], dim=-1)  # a projection's slices
    found, wanted = torch.zeros(2, 2, 4, 2, 2, dtype=torch.float64)
    slots = torch.tensor([1, 0])
    a = lightning_attention_decode(*tokens.split(2, dim=-1), x.log_decay, found, slots)
    b = lightning_attention_decode(*(y[:, 0] for y in x[:3]), x.log_decay, wanted, slots)
    assert torch.equal(a, b)
    assert torch.equal(found, wanted)
