"""Documents cut into pieces of at most one row."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """A stretch of one document: inputs start .. start + length - 1, each with its next token.

    Args:
        document: number of the document.
        start: first input token in the document.
        length: number of (input, label) pairs, at least 1.
    """

    document: int
    start: int
    length: int


class PieceTable:
    """Numbers the pieces of all documents.

    A document of n + 1 tokens has n (input, label) pairs, cut into pieces of `row_tokens` pairs
    and a rest. Memory: 16 bytes per document.

    Args:
        document_lengths: [documents] int64, tokens of each document; those below 2 have no pair.
        row_tokens: most pairs of a piece.
    """

    def __init__(self, document_lengths: np.ndarray, row_tokens: int) -> None:
        self._row_tokens = row_tokens
        self._pairs = np.maximum(document_lengths.astype(np.int64) - 1, 0)  # [documents]
        # [documents]; end[d] is one past the last piece of document d.
        self._end = np.cumsum(-(-self._pairs // row_tokens))
        self.num_pairs = int(self._pairs.sum())
        self.num_pieces = int(self._end[-1]) if len(self._end) else 0

    def lengths(self, pieces: np.ndarray) -> np.ndarray:
        """Return the pairs of each piece, [pieces] int64."""
        documents, starts = self._locate(pieces)
        return np.minimum(self._row_tokens, self._pairs[documents] - starts)

    def spans(self, pieces: np.ndarray) -> list[Span]:
        """Return the stretch of document that each piece is."""
        documents, starts = self._locate(pieces)
        rows = zip(documents.tolist(), starts.tolist(), self.lengths(pieces).tolist(), strict=True)
        return [Span(*row) for row in rows]

    def _locate(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        documents = np.searchsorted(self._end, pieces, side="right")
        # All pieces before the last of a document are whole rows, so its first piece is its end
        # less its count.
        first = self._end[documents] - (-(-self._pairs[documents] // self._row_tokens))
        return documents, (pieces - first) * self._row_tokens
