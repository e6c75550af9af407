"""The computed permutation is one, is seeded, and looks random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.data.permutation import Permutation, mix_key


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70))
def test_every_value_comes_once(size: int, seed: int) -> None:
    values = Permutation(size, (seed, 1))(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))


def test_access_is_random_and_huge_sizes_work() -> None:
    permutation = Permutation(10**15, (1,))
    some = permutation(np.array([5, 10**15 - 1, 7]))
    assert some.tolist() == [permutation(np.array([i]))[0] for i in (5, 10**15 - 1, 7)]
    assert np.all((some >= 0) & (some < 10**15))


def test_the_permutation_never_changes() -> None:
    # A run that is resumed years later must go on with the same data.
    assert Permutation(10, (7, 0, 3))(np.arange(10)).tolist() == [8, 2, 3, 0, 5, 6, 1, 9, 7, 4]


def test_keys_and_their_order_matter() -> None:
    orders = {tuple(Permutation(50, key)(np.arange(50))) for key in ((1, 2), (2, 1), (1,), (3,))}
    assert len(orders) == 4
    assert mix_key((0,)) != mix_key((0, 0))


def test_places_are_uniform_over_seeds() -> None:
    size, seeds = 6, 3000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), Permutation(size, (seed,))(np.arange(size))] += 1
    # Each cell is binomial(seeds, 1 / size); five standard deviations never happen by chance.
    deviation = np.sqrt(seeds * (1 / size) * (1 - 1 / size))
    assert np.abs(counts - seeds / size).max() < 5 * deviation


def test_neighbours_are_torn_apart() -> None:
    values = Permutation(10_000, (3,))(np.arange(10_000))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("size", [0, 2**62 + 1])
def test_size_has_limits(size: int) -> None:
    with pytest.raises(ValueError, match=rf"size must lie in \[1, 2\*\*62\], got {size}"):
        Permutation(size, (1,))
