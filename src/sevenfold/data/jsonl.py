"""JSONL files, plain or gzipped, read line by line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from sevenfold.config import DataError
from sevenfold.data.documents import Document, OnBadUtf8, decode_utf8, document_from_text
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.sources import SourceFile

# JSON spells one character with up to six bytes (\u0041); other fields need room too.
_LINE_BYTES_PER_TEXT_BYTE = 8


def read_jsonl(file: SourceFile, config: PrepareConfig) -> Iterator[Document]:
    """Yield one document per line; blank lines are skipped, a null text is an empty document.

    Raises:
        DataError: a line is not UTF-8, is no JSON object, lacks config.text_field or is too long;
            or the gzip stream is damaged. The message names file and line.
    """
    limit = _LINE_BYTES_PER_TEXT_BYTE * config.max_document_bytes
    offset = 0
    for number, line in enumerate(_lines(file, limit), start=1):
        place = f"{file.path}: line {number}"
        if len(line) > limit:
            raise DataError(f"{place} must be at most {limit} bytes; raise max_document_bytes")
        if line.strip():
            content = _decode(line, place, offset, config.on_bad_utf8)
            text = _text_field(content, place, config.text_field)
            yield document_from_text(text, place, on_bad_utf8=config.on_bad_utf8)
        offset += len(line)


def _lines(file: SourceFile, limit: int) -> Iterator[bytes]:
    with _open(file) as stream:
        try:
            while line := stream.readline(limit + 1):
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{file.path} must be an undamaged gzip file: {error}; copy or compress it again"
            ) from error


def _open(file: SourceFile) -> BinaryIO:
    if file.kind == "jsonl.gz":
        return cast(BinaryIO, gzip.open(file.path, "rb"))
    return file.path.open("rb")


def _decode(line: bytes, place: str, offset: int, on_bad_utf8: OnBadUtf8) -> str:
    if on_bad_utf8 == "replace":
        return line.decode("utf-8-sig", "replace")
    return decode_utf8(line, place, offset_bytes=offset).removeprefix("\ufeff")


def _text_field(line: str, place: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} must be JSON, got {_excerpt(line)!r} ({error.msg} at column {error.colno}); "
            f"repair or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{place} must be a JSON object, got {_excerpt(line)!r}")
    if field not in record:
        known = ", ".join(sorted(record))
        raise DataError(f"{place} must have the field {field!r}, got {known}; set text_field")
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} must be a string, got {type(text).__name__}")
    return text or ""


def _excerpt(line: str) -> str:
    return line.strip()[:60]
