"""What the tokens of a batch belong to."""

import re

import pytest
import torch
from model_cases import CPU

from sevenfold.models import Batch


def test_rows_are_sequences() -> None:
    batch = Batch.rows(2, 3, device=CPU)
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.lengths, batch.past, batch.totals) == ((3, 3), (0, 0), (3, 3))
    assert (batch.cu_seqlens, batch.num_sequences, batch.is_step) == (None, 2, False)


def test_rows_after_what_was_seen() -> None:
    batch = Batch.rows(2, 2, past=[5, 0], device=CPU)
    assert batch.positions.tolist() == [[5, 6], [0, 1]]
    assert batch.totals == (7, 2)


def test_packed_sequences_lie_one_after_another() -> None:
    batch = Batch.packed([2, 0, 3], past=[0, 4, 7], device=CPU)
    assert batch.positions.tolist() == [[0, 1, 7, 8, 9]]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert (batch.cu_seqlens.dtype, batch.positions.dtype) == (torch.int32, torch.int64)
    assert (batch.totals, batch.num_sequences, batch.is_step) == ((2, 4, 10), 3, False)


def test_borders_stay_on_the_host() -> None:
    batch = Batch.packed([2, 3], device=torch.device("meta"))
    assert (batch.positions.device.type, batch.cu_seqlens.device.type) == ("meta", "cpu")


@pytest.mark.parametrize(
    ("batch", "is_step"),
    [
        (Batch.rows(3, 1, device=CPU), True),
        (Batch.packed([1, 1], past=[4, 9], device=CPU), True),
        (Batch.packed([1, 0], device=CPU), False),
        (Batch.packed([2], device=CPU), False),
    ],
)
def test_a_step_is_one_token_for_each(batch: Batch, is_step: bool) -> None:
    assert batch.is_step == is_step


@pytest.mark.parametrize("lengths", [[], [1, -1]])
def test_wrong_lengths(lengths: list[int]) -> None:
    message = f"lengths must be one or more numbers >= 0, got {lengths}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Batch.packed(lengths, device=CPU)


@pytest.mark.parametrize("past", [[1], [1, 2, 3], [0, -1]])
def test_wrong_past(past: list[int]) -> None:
    message = re.escape(f"past must be 2 numbers >= 0, got {past}")
    with pytest.raises(ValueError, match=message):
        Batch.packed([1, 1], past=past, device=CPU)
    with pytest.raises(ValueError, match=message):
        Batch.rows(2, 1, past=past, device=CPU)
