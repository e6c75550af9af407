"""Plain text files as documents: whole, or cut at paragraph ends."""

import codecs
import re
from collections.abc import Iterator

from sevenfold.config import DataError
from sevenfold.data.documents import Document, document_from_bytes
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.sources import SourceFile

_PARAGRAPH_END = re.compile(rb"\n[ \t\r]*\n\s*")
_LINE_END = re.compile(rb"\n")
_SPACE = re.compile(rb"[ \t]")


def read_text(file: SourceFile, config: PrepareConfig) -> Iterator[Document]:
    """Yield the documents of a plain text file; a byte-order mark at its start is dropped.

    Raises:
        DataError: the text is not UTF-8, or one document exceeds config.max_document_bytes.
    """
    size = config.split_documents_bytes
    if size is None and file.num_bytes > config.max_document_bytes:
        raise DataError(
            f"{file.path}: a document must be at most max_document_bytes "
            f"({config.max_document_bytes}), got {file.num_bytes} bytes; "
            f"set split_documents_bytes, or raise max_document_bytes"
        )
    pieces = _whole(file) if size is None else split_pieces(file, size)
    for offset, piece in pieces:
        data = piece.removeprefix(codecs.BOM_UTF8) if offset == 0 else piece
        dropped = len(piece) - len(data)
        yield document_from_bytes(
            data, str(file.path), offset_bytes=offset + dropped, on_bad_utf8=config.on_bad_utf8
        )


def split_pieces(file: SourceFile, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cut a file into pieces of `size_bytes` to twice as much; joined, they are the file.

    Args:
        file: the file.
        size_bytes: where to begin looking for the end of a paragraph; failing that within the
            next `size_bytes` the cut falls at a line end, a space, or between two characters.

    Yields:
        Byte offset and bytes of each piece.
    """
    offset = 0
    rest = b""
    with file.path.open("rb") as stream:
        while True:
            missing = max(0, 2 * size_bytes - len(rest))
            rest += stream.read(missing)
            if len(rest) < 2 * size_bytes:
                break
            cut = _cut(rest, size_bytes)
            yield offset, rest[:cut]
            offset += cut
            rest = rest[cut:]
    if rest:
        yield offset, rest


def _whole(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    yield 0, file.path.read_bytes()


def _cut(data: bytes, start: int) -> int:
    for boundary in (_PARAGRAPH_END, _LINE_END, _SPACE):
        match = boundary.search(data, start)
        if match is not None:
            return match.end()
    return _character_start(data, len(data) - 1)


def _character_start(data: bytes, end: int) -> int:
    first = end
    # A UTF-8 character has at most three continuation bytes, 0b10xxxxxx.
    while end - first < 3 and data[first] & 0xC0 == 0x80:
        first -= 1
    return first
