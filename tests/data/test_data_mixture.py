"""A mixture is a pure function of the index, and its shares are the weights' integrals."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.config import DataError
from sevenfold.data import LengthSlice, MixtureLoader, MixtureSource, PackedLoader


@dataclass(frozen=True)
class Numbers:
    """Serves the number that it is asked for, and its own name."""

    name: str

    def sample(self, index: int) -> tuple[str, int]:
        return self.name, index


def mixture(*weights: tuple[float, float, float], num_rows: int = 1000, **more) -> MixtureLoader:
    sources = [
        MixtureSource(name, Numbers(name), weight, end, begin)
        for name, (weight, end, begin) in zip("abcdef", weights, strict=False)
    ]
    return MixtureLoader(sources, seed=7, num_rows=num_rows, **more)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_each_source_is_read_in_order_without_gaps(pairs: list, block_rows: int) -> None:
    weights = [(w, e + 0.01, 0.0) for w, e in pairs]
    loader = mixture(*weights, num_rows=70, block_rows=block_rows)
    read = [loader.sample(i) for i in range(90)]
    for source in loader.sources:
        own = sorted(row for name, row in read if name == source.name)
        assert own == list(range(len(own)))
    # Asked in any order, by another loader: the same.
    again = mixture(*weights, num_rows=70, block_rows=block_rows)
    assert [again.sample(i) for i in reversed(range(90))] == read[::-1]
    counts = loader.rows_read(77)
    assert counts == {s.name: sum(n == s.name for n, _ in read[:77]) for s in loader.sources}


def test_shares_are_the_integrals_of_the_weights_to_a_row() -> None:
    loader = mixture((0.7, 0.3, 0.0), (0.3, 0.7, 0.0), (0.001, 0.001, 0.0), num_rows=10_240)
    wanted = np.zeros(3)
    for block in range(40):
        middle = (block + 0.5) * 256 / 10_240
        wanted += 256 * np.array([0.7 - 0.4 * middle, 0.3 + 0.4 * middle, 0.001]) / 1.001
        found = np.array(list(loader.rows_read(256 * (block + 1)).values()))
        assert np.abs(found - wanted).max() <= 1
    assert found[2] == 10  # a source of one row in a thousand is not lost


def test_weights_move_until_the_transition_ends_and_a_late_source_takes_its_share() -> None:
    loader = mixture((0.8, 0.2, 0.0), (0.2, 0.8, 0.0), (0.1, 0.1, 0.8), transition=0.5)
    for share, expected in ((0, (0.8, 0.2, 0)), (0.25, (0.5, 0.5, 0)), (0.5, (0.2, 0.8, 0))):
        assert np.abs(loader.weights(share) - expected).max() < np.finfo(float).eps * 4
    assert np.abs(loader.weights(0.8) - (0.18, 0.72, 0.1)).max() < np.finfo(float).eps * 4
    assert np.array_equal(loader.weights(5.0), loader.weights(1.0))


def test_a_source_goes_on_after_the_rows_that_came_before() -> None:
    sources = [MixtureSource("a", Numbers("a"), 1.0, 1.0, first_row=40)]
    loader = MixtureLoader(sources, seed=0, num_rows=10, block_rows=4)
    assert sorted(loader.sample(i)[1] for i in range(8)) == list(range(40, 48))
    assert loader.rows_read(6) == {"a": 46}
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        loader.sample(-1)


@dataclass(frozen=True)
class Documents:
    lengths: tuple[int, ...]

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.full(self.lengths[index], index)[start:stop]

    def document_lengths(self) -> np.ndarray:
        return np.array(self.lengths, dtype=np.int64)

    def token_byte_lengths(self) -> np.ndarray:
        return np.ones(10, dtype=np.int32)


def test_a_slice_has_the_documents_of_its_lengths() -> None:
    all_of = Documents((3, 10, 4, 11, 9))
    part = LengthSlice(all_of, name="x", min_tokens=4, max_tokens=10)
    assert part.document_lengths().tolist() == [4, 9]
    assert [int(part.document(i)[0]) for i in range(2)] == [2, 4]
    rows = PackedLoader(part, seq_len=5, seed=1)
    assert rows.num_targets_per_epoch() == 3 + 8
    with pytest.raises(
        DataError, match="source 'x' must have a document of 12 tokens or more, got"
    ):
        LengthSlice(all_of, name="x", min_tokens=12, max_tokens=None)
