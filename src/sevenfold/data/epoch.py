"""Where each row of each epoch comes from, without going through the rows before it."""

from dataclasses import dataclass

import numpy as np

from sevenfold.data.packing import clip_spans, pack_spans
from sevenfold.data.permutation import Permutation
from sevenfold.data.pieces import PieceTable, Span

_CHUNK_PIECES = 1 << 20
# Domains of the seeded permutations, so that pieces and rows are never shuffled by one key.
_PIECES, _ROWS = 0, 1


@dataclass(frozen=True)
class _EpochIndex:
    """Where the blocks of one epoch begin.

    Args:
        epoch: the epoch.
        first_piece: [blocks + 1] int64, position of the piece that holds each block's first pair.
        skip: [blocks + 1] int64, pairs of that piece that belong to the block before.
    """

    epoch: int
    first_piece: np.ndarray
    skip: np.ndarray


class BlockPlanner:
    """Plans an epoch block by block.

    The pieces of an epoch, in permuted order and laid end to end, are cut into blocks of
    block_rows * seq_len pairs. So the number of rows follows from the number of pairs alone, and
    a row's block is one division away. The plan of the last block and the block starts of the
    last epoch are kept to save time; they never change a result.

    Args:
        table: the pieces.
        seq_len: pairs of a row.
        block_rows: rows of a block.
        seed: of the permutations; None keeps the stored order.
    """

    def __init__(
        self, table: PieceTable, *, seq_len: int, block_rows: int, seed: int | None
    ) -> None:
        self._table = table
        self._seq_len = seq_len
        self._block_rows = block_rows
        self._seed = seed
        self.num_pairs = table.num_pairs
        self.num_rows = -(-table.num_pairs // seq_len)
        self._index: _EpochIndex | None = None
        self._plan: tuple[tuple[int, int], list[list[Span]]] | None = None

    def row(self, epoch: int, row: int) -> list[Span]:
        """Return the spans of one row of one epoch, in the order in which they are packed."""
        block, number = divmod(row, self._block_rows)
        # A local name, so that threads that share a loader cannot swap the plan underneath.
        plan = self._plan
        if plan is None or plan[0] != (epoch, block):
            plan = ((epoch, block), self._plan_block(epoch, block))
            self._plan = plan
        return plan[1][number]

    def _plan_block(self, epoch: int, block: int) -> list[list[Span]]:
        index = self._index
        if index is None or index.epoch != epoch:
            index = self._index_epoch(epoch)
            self._index = index
        first, last = index.first_piece[block : block + 2].tolist()
        stop = min(last + 1, self._table.num_pieces)
        spans = self._table.spans(self._order(epoch, np.arange(first, stop)))
        take = min(self._block_pairs, self.num_pairs - block * self._block_pairs)
        spans = clip_spans(spans, int(index.skip[block]), take)
        return self._shuffle_rows(pack_spans(spans, self._seq_len), epoch, block)

    @property
    def _block_pairs(self) -> int:
        return self._block_rows * self._seq_len

    def _order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if self._seed is None:
            return positions
        return Permutation(self._table.num_pieces, (self._seed, _PIECES, epoch))(positions)

    def _shuffle_rows(self, rows: list[list[Span]], epoch: int, block: int) -> list[list[Span]]:
        """Mix the rows, which packing has sorted by the length of their longest span."""
        if self._seed is None:
            return rows
        # Only whole rows: the padded row, if there is one, stays the epoch's last.
        padded = sum(span.length for span in rows[-1]) < self._seq_len
        whole = len(rows) - padded
        if whole == 0:
            return rows
        order = Permutation(whole, (self._seed, _ROWS, epoch, block))(np.arange(whole))
        return [rows[number] for number in order.tolist()] + rows[whole:]

    def _index_epoch(self, epoch: int) -> _EpochIndex:
        blocks = -(-self.num_pairs // self._block_pairs)
        starts = np.arange(blocks + 1) * self._block_pairs  # [blocks + 1]
        starts[-1] = self.num_pairs
        first_piece = np.empty(blocks + 1, dtype=np.int64)
        skip = np.empty(blocks + 1, dtype=np.int64)
        done_pairs = 0
        for chunk in range(0, self._table.num_pieces, _CHUNK_PIECES):
            stop = min(chunk + _CHUNK_PIECES, self._table.num_pieces)
            lengths = self._table.lengths(self._order(epoch, np.arange(chunk, stop)))
            ends = done_pairs + np.cumsum(lengths)  # [chunk]
            # The block starts that fall inside this chunk, and the piece that holds each.
            low, high = np.searchsorted(starts, (done_pairs, ends[-1]))
            at = np.searchsorted(ends, starts[low:high], side="right")
            first_piece[low:high] = chunk + at
            skip[low:high] = starts[low:high] - (ends[at] - lengths[at])
            done_pairs = int(ends[-1])
        first_piece[blocks], skip[blocks] = self._table.num_pieces, 0
        return _EpochIndex(epoch, first_piece, skip)
