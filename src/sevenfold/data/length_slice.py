"""The documents of a dataset whose length lies in a range."""

import numpy as np

from sevenfold.config import DataError
from sevenfold.data.loader import TokenSource


class LengthSlice:
    """Shows the documents of min_tokens to max_tokens, in their order, as a source of their own.

    Args:
        dataset: all documents.
        name: of the source, for messages.
        min_tokens: fewest tokens of a document.
        max_tokens: it has fewer than these; None is any number.

    Raises:
        DataError: no document has such a length.

    Memory: 8 bytes per document of the range.
    """

    def __init__(
        self, dataset: TokenSource, *, name: str, min_tokens: int, max_tokens: int | None
    ) -> None:
        lengths = dataset.document_lengths()
        inside = lengths >= min_tokens
        if max_tokens is not None:
            inside &= lengths < max_tokens
        if not inside.any():
            raise DataError(
                f"source {name!r} must have a document of {min_tokens} tokens or more"
                f"{'' if max_tokens is None else f' and fewer than {max_tokens}'}, got none; "
                f"leave the source out or widen its range"
            )
        self._dataset = dataset
        self._documents = np.flatnonzero(inside)
        self._lengths = lengths[inside]

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the tokens [start, stop) of one document; None is its end."""
        return self._dataset.document(int(self._documents[index]), start, stop)

    def document_lengths(self) -> np.ndarray:
        """Return the tokens of every document, [documents] int64."""
        return self._lengths

    def token_byte_lengths(self) -> np.ndarray:
        """Return the UTF-8 bytes of every token, [vocab_size]."""
        return self._dataset.token_byte_lengths()
