"""What one context rank holds of a packed row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sevenfold.models import Batch
from sevenfold.parallel.context.cut import NUM_STRETCHES, Cut, cut_row, pieces_between


@dataclass(frozen=True)
class Piece:
    """The first or last piece of a document in a stretch: its place among the rank's tokens."""

    start: int
    length: int

    @property
    def tokens(self) -> slice:
        """Its tokens."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class ContextBatch(Batch):
    """One rank's two stretches of a packed row; its sequences are the pieces of documents in them.

    cut: of the row.
    rank: whose.
    num_pieces: of each of the two stretches.
    """

    cut: Cut
    rank: int
    num_pieces: tuple[int, int]

    @property
    def stretches(self) -> tuple[int, int]:
        """The rank's stretches, as the cut counts them."""
        return self.cut.of_rank(self.rank)

    @property
    def slices(self) -> tuple[slice, slice]:
        """The tokens of the row that the rank holds, in its order."""
        first, last = (slice(self.cut.start(c), self.cut.end(c)) for c in self.stretches)
        return first, last

    @cached_property
    def first_pieces(self) -> tuple[Piece, Piece]:
        """The first piece of each stretch."""
        size, lengths = self.cut.size, self.lengths
        return Piece(0, lengths[0]), Piece(size, lengths[self.num_pieces[0]])

    @cached_property
    def last_pieces(self) -> tuple[Piece, Piece]:
        """The last piece of each stretch."""
        size, lengths = self.cut.size, self.lengths
        n, m = lengths[self.num_pieces[0] - 1], lengths[-1]
        return Piece(size - n, n), Piece(2 * size - m, m)


def divide_row(
    lengths: Sequence[int], num_ranks: int, rank: int, *, device: torch.device
) -> ContextBatch:
    """Cut a row of documents, and describe what one rank holds of it.

    Args:
        lengths: tokens of each document of the whole row, at least 1.
        num_ranks: context ranks; twice as many divide the sum of the lengths.
        rank: whose stretches.
        device: the model's.

    Returns:
        The rank's batch; a piece that continues a document has the earlier tokens as its past, so
        positions go on across the border.

    Raises:
        ValueError: the row cannot be divided evenly.
    """
    cut = cut_row(lengths, num_ranks)
    own = [pieces_between(lengths, cut.start(c), cut.end(c)) for c in cut.of_rank(rank)]
    pieces = [piece for stretch in own for piece in stretch]
    base = Batch.packed([n for _, n in pieces], past=[past for past, _ in pieces], device=device)
    return ContextBatch(
        lengths=base.lengths,
        past=base.past,
        positions=base.positions,
        cu_seqlens=base.cu_seqlens,
        cut=cut,
        rank=rank,
        num_pieces=(len(own[0]), len(own[1])),
    )


def context_batch(batch: Batch, state: object) -> ContextBatch:
    """Return the batch as what a rank holds of a row.

    Raises:
        TypeError: it is a whole batch, or there is a state, which goes between calls and not ranks.
    """
    if not isinstance(batch, ContextBatch) or state is not None:
        raise TypeError(
            f"batch must be a ContextBatch (see divide_row) without a state under context "
            f"parallelism, got {type(batch).__name__} and {type(state).__name__}"
        )
    return batch


SLOTS = range(NUM_STRETCHES)
