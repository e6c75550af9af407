"""Several sources in one stream of rows, by weights that move: a pure function of the index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sevenfold.data.loader import PackedSample
from sevenfold.data.permutation import Permutation

# Domain of the permutation of a block's rows, beside those of pieces and rows.
_MIX = 2


class RowSource(Protocol):
    """The part of a PackedLoader that a mixture needs."""

    def sample(self, index: int) -> PackedSample:
        """Return one row."""
        ...


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Args:
        name: tells it apart.
        rows: where its rows come from.
        weight: its share of the rows at the beginning, in proportion to the others'.
        end_weight: what the weight becomes by the end of the transition.
        begin_share: from which share of the mixture's rows on it takes part; with one above 0 its
            weight is its share itself, and the others divide what is left.
        first_row: rows of it that came before the mixture's first.
    """

    name: str
    rows: RowSource
    weight: float
    end_weight: float
    begin_share: float = 0.0
    first_row: int = 0


class MixtureLoader:
    """Serves rows of several sources, forever.

        w_s(x) = weight_s + (end_weight_s - weight_s) min(1, x / transition)      x = index / rows

    Rows are dealt out block by block: a block holds as many rows of each source as brings its total
    nearest to the integral of its weight, in a seeded order. So a source's share is exact to one
    row at every border of a block, however small, and `sample(index)` depends on nothing but the
    arguments and the index.

    Args:
        sources: at least one; those that begin with the mixture have a weight above 0 together.
        seed: any integer.
        num_rows: rows over which shares are counted; later rows keep the last weights.
        transition: share of those rows by which weights reach their ends, above 0 to 1.
        block_rows: rows of a block.

    Memory: 8 bytes a source and block, of the blocks up to the furthest asked for.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        *,
        seed: int,
        num_rows: int,
        transition: float = 1.0,
        block_rows: int = 256,
    ) -> None:
        self.sources = tuple(sources)
        self._seed, self._num_rows = seed, num_rows
        self._transition, self._block_rows = transition, block_rows
        # [blocks + 1, sources]: rows of each source before each block.
        self._dealt = np.zeros((1, len(sources)), dtype=np.int64)
        self._wanted = np.zeros(len(sources))

    def weights(self, share: float) -> np.ndarray:
        """Return each source's part of the rows, summing to 1, at a share of the mixture."""
        moved = min(1.0, share / self._transition)
        found = np.array([s.weight + (s.end_weight - s.weight) * moved for s in self.sources])
        begins = np.array([s.begin_share for s in self.sources])
        late = begins > 0
        found[late & (share < begins)] = 0.0
        found[~late] *= (1 - found[late].sum()) / found[~late].sum()
        return found

    def sample(self, index: int) -> PackedSample:
        """Return one row.

        Args:
            index: 0 or more.

        Raises:
            ValueError: index is negative.
        """
        number, row = self.source_of(index)
        return self.sources[number].rows.sample(row)

    def source_of(self, index: int) -> tuple[int, int]:
        """Return which source an index reads, and which row of it."""
        if index < 0:
            raise ValueError(f"index must be at least 0, got {index}")
        block, place = divmod(index, self._block_rows)
        owners = self._owners(block)
        number = int(owners[place])
        before = int(self._dealt[block, number]) + int((owners[:place] == number).sum())
        return number, self.sources[number].first_row + before

    def rows_read(self, index: int) -> dict[str, int]:
        """Return the rows of each source before an index, those before the mixture included."""
        block, place = divmod(index, self._block_rows)
        owners = self._owners(block)[:place]
        counts = self._dealt[block] + np.bincount(owners, minlength=len(self.sources))
        return {
            source.name: source.first_row + int(count)
            for source, count in zip(self.sources, counts, strict=True)
        }

    def _owners(self, block: int) -> np.ndarray:
        """[block_rows]: the source of each row of a block."""
        self._deal(block)
        counts = self._dealt[block + 1] - self._dealt[block]
        owners = np.repeat(np.arange(len(self.sources)), counts)
        order = Permutation(self._block_rows, (self._seed, _MIX, block))
        return owners[order(np.arange(self._block_rows))]

    def _deal(self, block: int) -> None:
        """Count rows up to the end of a block; each depends on the blocks before it alone."""
        dealt = [*self._dealt]
        while len(dealt) <= block + 1:
            middle = (len(dealt) - 0.5) * self._block_rows
            self._wanted = self._wanted + self._block_rows * self.weights(middle / self._num_rows)
            dealt.append(dealt[-1] + _dealt_out(self._wanted - dealt[-1], self._block_rows))
        self._dealt = np.stack(dealt)


def _dealt_out(wanted: np.ndarray, num_rows: int) -> np.ndarray:
    """Whole numbers near `wanted` that sum to num_rows; the largest remainders are rounded up."""
    counts = np.maximum(np.floor(wanted), 0).astype(np.int64)
    order = np.argsort(counts - wanted, kind="stable")
    missing = num_rows - int(counts.sum())
    counts[order[:missing]] += 1
    if missing < 0:  # a source was ahead, and what it had too many the largest gives back
        counts[int(np.argmax(counts))] += missing
    return counts
