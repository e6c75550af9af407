"""Recognising documents that repeat an earlier one."""

import hashlib
import unicodedata
from typing import Protocol

from sevenfold.data.minhash import NearDuplicates
from sevenfold.data.prepare_config import PrepareConfig


class Deduplicator(Protocol):
    """Something that remembers the documents it saw."""

    def is_duplicate(self, text: str) -> bool:
        """Return whether an earlier text was the same; if not, remember this one."""
        ...


class ExactDuplicates:
    """Finds texts that are equal after Unicode composition (NFC) and folding of whitespace.

    Memory: about 170 bytes per distinct document.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_duplicate(self, text: str) -> bool:
        """Return whether an equal text came before; if not, remember this one."""
        digest = hashlib.sha256(fold_whitespace(text).encode("utf-8")).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False


def make_deduplicator(config: PrepareConfig) -> Deduplicator | None:
    """Return the deduplicator that the configuration asks for, or None.

    Raises:
        UnsupportedError: config.dedup is "minhash" and datasketch is not installed.
    """
    match config.dedup:
        case None:
            return None
        case "exact":
            return ExactDuplicates()
        case "minhash":
            return NearDuplicates(config.minhash_threshold)


def fold_whitespace(text: str) -> str:
    """Return the text in NFC with every run of whitespace as one space and the ends stripped."""
    return " ".join(unicodedata.normalize("NFC", text).split())
