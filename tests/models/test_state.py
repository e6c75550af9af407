"""What a layer carries: its sizes, dtypes, and copies of some sequences."""

import pytest
import torch
from model_cases import CPU, tiny_config

from sevenfold.models import (
    KVState,
    LinearState,
    PagedKV,
    PageTable,
    PooledState,
    empty_state,
    select_sequences,
)


@pytest.mark.parametrize(
    ("dtype", "linear"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_empty_state_is_zero_and_the_linear_one_fp32(
    dtype: torch.dtype, linear: torch.dtype
) -> None:
    state = empty_state(tiny_config("lfs", window=3), 2, 7, device=CPU, dtype=dtype)
    assert torch.equal(state[0].kv, torch.zeros(2, 2, 6, 6, dtype=linear))
    for layer, places in ((state[1], 7), (state[2], 3)):
        assert layer.num_places == places
        for x in (layer.k, layer.v):
            assert torch.equal(x, torch.zeros(2, places, 1, 6, dtype=dtype))
    assert state[0].kv.dtype == linear


def test_selected_sequences_are_copies() -> None:
    state = empty_state(tiny_config("lf"), 3, 2, device=CPU, dtype=torch.float32)
    for n in range(3):
        state[0].kv[n], state[1].k[n], state[1].v[n] = n, 10 + n, 20 + n
    picked = select_sequences(state, torch.tensor([2, 0, 2]))
    assert isinstance(picked[0], LinearState)
    assert isinstance(picked[1], KVState)
    assert picked[0].kv[:, 0, 0, 0].tolist() == [2, 0, 2]
    assert picked[1].k[:, 0, 0, 0].tolist() == [12, 10, 12]
    assert picked[1].v[:, 1, 0, 3].tolist() == [22, 20, 22]
    picked[0].kv.fill_(9)
    picked[1].k.fill_(9)
    assert (state[0].kv.max(), state[1].k.max()) == (2, 12)


def test_selecting_pools_and_pages() -> None:
    pool, slots = torch.zeros(4, 1, 2, 2), torch.tensor([3, 0, 2])
    (selected,) = select_sequences((PooledState(pool, slots),), torch.tensor([2, 0]))
    assert selected.pool is pool
    assert selected.slots.tolist() == [2, 3]
    pages = torch.zeros(1, 2, 1, 2)
    table = PageTable(torch.zeros(1, 1, dtype=torch.int64), slots, slots)
    with pytest.raises(
        TypeError, match="state must own its keys to be selected from, got a PagedKV"
    ):
        select_sequences((PagedKV(pages, pages, table),), torch.tensor([0]))
