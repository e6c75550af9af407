"""Near-duplicates by MinHash and locality-sensitive hashing (needs datasketch)."""

import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import numpy as np

from sevenfold.config import UnsupportedError

_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_SEED = 1
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Finds texts whose word 5-grams resemble those of an earlier text.

    Candidates come from an LSH index and count as duplicates when the estimated Jaccard
    similarity, the share of equal minima among 128 permutations, reaches the threshold.
    Case, punctuation and whitespace do not matter. Memory: about 5 KB per distinct document.

    Args:
        threshold: similarity in (0, 1] from which two texts are near-duplicates.

    Raises:
        UnsupportedError: datasketch is not installed.

    Source: Broder, "On the resemblance and containment of documents", 1997.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._datasketch = _import_datasketch()
        self._index = self._datasketch.MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._minima: list[np.ndarray] = []  # each [_PERMUTATIONS]

    def is_duplicate(self, text: str) -> bool:
        """Return whether a similar text came before; if not, remember this one."""
        sketch = self._datasketch.MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
        sketch.update_batch(list(_shingles(text)))
        minima = np.asarray(sketch.hashvalues)
        if any(
            self._similarity(minima, number) >= self._threshold for number in self._near(sketch)
        ):
            return True
        self._index.insert(len(self._minima), sketch)
        self._minima.append(minima)
        return False

    def _near(self, sketch: object) -> list[int]:
        return self._index.query(sketch)

    def _similarity(self, minima: np.ndarray, number: int) -> float:
        return float(np.mean(minima == self._minima[number]))


def _shingles(text: str) -> Iterator[bytes]:
    words = _WORD.findall(text.lower())
    if len(words) < _SHINGLE_WORDS:
        # Too short for one shingle: the words themselves, or the bare text when there are none.
        yield " ".join(words or [text.strip()]).encode("utf-8")
        return
    for first in range(len(words) - _SHINGLE_WORDS + 1):
        yield " ".join(words[first : first + _SHINGLE_WORDS]).encode("utf-8")


def _import_datasketch() -> ModuleType:
    try:
        return import_module("datasketch")
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            'dedup = "minhash" needs datasketch; pip install sevenfold[dedup]'
        ) from error
