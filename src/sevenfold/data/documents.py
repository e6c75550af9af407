"""The unit of all preparation: one document of text."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from sevenfold.config import DataError

OnBadUtf8 = Literal["error", "replace"]


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        text: its text.
        utf8: the same text as UTF-8 bytes.
        place: file, and line or row, for messages.
    """

    text: str
    utf8: bytes
    place: str

    def is_empty(self) -> bool:
        """Return whether the document holds nothing but whitespace."""
        return not self.text or self.text.isspace()

    def split_key(self) -> int:
        """Return the number in [0, 2**64) that decides the document's split: a content hash."""
        return int.from_bytes(hashlib.sha256(self.utf8).digest()[:8], "big")


def document_from_bytes(
    data: bytes, place: str, *, offset_bytes: int, on_bad_utf8: OnBadUtf8
) -> Document:
    """Decode UTF-8 bytes into a document.

    Args:
        data: the bytes.
        place: where they come from, for messages.
        offset_bytes: position of their first byte in the file, for messages.
        on_bad_utf8: what to do with damaged UTF-8.

    Raises:
        DataError: the bytes are not UTF-8 and on_bad_utf8 is "error".
    """
    if on_bad_utf8 == "replace":
        return document_from_text(data.decode("utf-8", "replace"), place, on_bad_utf8=on_bad_utf8)
    return Document(decode_utf8(data, place, offset_bytes=offset_bytes), data, place)


def document_from_text(text: str, place: str, *, on_bad_utf8: OnBadUtf8) -> Document:
    """Make a document of a string that may hold lone surrogates (JSON can spell them).

    Raises:
        DataError: the text holds a lone surrogate and on_bad_utf8 is "error".
    """
    try:
        return Document(text, text.encode("utf-8"), place)
    except UnicodeEncodeError as error:
        if on_bad_utf8 == "error":
            raise DataError(
                f"{place}: text must be valid Unicode, got lone surrogate "
                f"U+{ord(text[error.start]):04X} at character {error.start}; {_REMEDY}"
            ) from error
    utf8 = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
    return Document(utf8.decode("utf-8"), utf8, place)


def decode_utf8(data: bytes, place: str, *, offset_bytes: int) -> str:
    """Decode strictly, naming place and byte offset of the first damage.

    Raises:
        DataError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: text must be UTF-8, got byte 0x{data[error.start]:02x} "
            f"at byte offset {offset_bytes + error.start}; {_REMEDY}"
        ) from error


_REMEDY = 'repair the file, or set on_bad_utf8 = "replace"'
