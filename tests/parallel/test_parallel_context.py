"""How a packed row is divided, and the decayed combine of states, against the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.ops import layer_log_decay, lightning_attention
from sevenfold.ops.testing import check_error
from sevenfold.parallel import ContextBatch, divide_row
from sevenfold.parallel.context.lightning import powers, reach_tokens

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=8)


def divided(lengths: list[int], num_ranks: int) -> list[ContextBatch]:
    return [divide_row(lengths, num_ranks, rank, device=CPU) for rank in range(num_ranks)]


def filled(lengths: list[int], num_ranks: int) -> list[int]:
    """The lengths, with a last document that makes them divisible."""
    rest = -sum(lengths) % num_ranks
    return [*lengths, rest] if rest else lengths


@given(LENGTHS, st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_stretches_hold_every_token_once_at_its_position(lengths: list[int], ranks: int) -> None:
    lengths = filled(lengths, ranks)
    parts = divided(lengths, ranks)
    positions = torch.cat([part.positions for part in parts], 1)[0]
    assert positions.tolist() == [p for length in lengths for p in range(length)]
    assert all(sum(part.lengths) * ranks == sum(lengths) for part in parts)
    assert [part.enters for part in parts] == [part.past[0] > 0 for part in parts]
    assert {part.crosses for part in parts} == {any(part.enters for part in parts)}


@given(LENGTHS, st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_states_of_earlier_ranks_make_the_whole_documents_state(
    lengths: list[int], ranks: int
) -> None:
    lengths = filled(lengths, ranks)
    T = sum(lengths)
    q, k, v = torch.randn(3, 1, T, 2, 3, generator=torch.Generator().manual_seed(T)).double()
    decay = layer_log_decay(2, 0, 8)
    added = []
    for part in divided(lengths, ranks):
        own = slice(part.first_token, part.first_token + sum(part.lengths))
        result = lightning_attention(
            q[:, own],
            k[:, own],
            v[:, own],
            decay,
            return_final_state=True,
            cu_seqlens=part.cu_seqlens,
            impl="reference",
        )
        added.append(result.final_state[-1])
    for rank, part in enumerate(divided(lengths, ranks)):
        weights = powers(decay.double(), part.distances)
        before = torch.einsum("hp,phkv->hkv", weights, torch.stack(added))
        first = part.first_token - part.past[0]
        exact = torch.zeros_like(before)
        if part.past[0]:
            span = slice(first, part.first_token)
            exact = lightning_attention(
                q[:, span],
                k[:, span],
                v[:, span],
                decay,
                return_final_state=True,
                impl="reference",
            ).final_state[0]
        check_error(f"rank {rank}", before, exact.float(), exact)


@given(LENGTHS, st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_the_way_back_is_the_transpose(lengths: list[int], ranks: int) -> None:
    parts = divided(filled(lengths, ranks), ranks)
    there = torch.stack([part.distances for part in parts])
    back = torch.stack([part.ahead for part in parts])
    assert torch.equal(there, back.t())


def test_a_document_that_begins_on_a_border_meets_nothing() -> None:
    parts = divided([4, 4, 8], 4)
    assert [part.enters for part in parts] == [False, False, False, True]
    assert parts[1].distances.tolist() == [-1, -1, -1, -1]
    assert parts[3].distances.tolist() == [-1, -1, 0, -1]


def test_a_document_over_all_ranks_reaches_back_by_whole_stretches() -> None:
    parts = divided([16], 4)
    assert parts[3].distances.tolist() == [8, 4, 0, -1]
    assert parts[0].ahead.tolist() == [-1, 0, 4, 8]


def test_states_below_fp32_are_zero_and_no_decay_never_fades() -> None:
    decay = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    found = powers(decay, torch.tensor([0, 80, 100, -1]))
    assert found[1].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert found[0, 1] > 0
    assert found[0, 2:].tolist() == [0.0, 0.0]
    assert reach_tokens(-1.0) == 88
    assert reach_tokens(0.0) > 1 << 60


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks must divide the row's 7 tokens, got 2"):
        divide_row([3, 4], 2, 0, device=CPU)
