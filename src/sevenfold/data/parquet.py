"""Parquet files, read by record batches."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from sevenfold.config import DataError
from sevenfold.data.documents import Document, document_from_bytes
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.sources import SourceFile

_ROWS_PER_BATCH = 64
_BUFFER_BYTES = 1 << 20


def read_parquet(file: SourceFile, config: PrepareConfig) -> Iterator[Document]:
    """Yield one document per row; a null text is an empty document.

    Raises:
        DataError: the file is not Parquet, has no text column of that name, or a text is damaged.
    """
    try:
        # Buffered and without pre_buffer: the reader then holds pages, not whole row groups.
        with pq.ParquetFile(file.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet:
            _check_column(file, parquet.schema_arrow, config.text_field)
            yield from _rows(file, parquet, config)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{file.path} must be an undamaged Parquet file: {error}; write it again"
        ) from error


def _rows(file: SourceFile, parquet: pq.ParquetFile, config: PrepareConfig) -> Iterator[Document]:
    field = config.text_field
    row = 0
    for batch in parquet.iter_batches(_ROWS_PER_BATCH, columns=[field], use_threads=False):
        # As bytes: Arrow does not check UTF-8 when it reads, and our message names the offset.
        for data in batch.column(0).cast(pa.large_binary()).to_pylist():
            row += 1
            place = f"{file.path}: row {row}"
            yield document_from_bytes(
                data or b"", place, offset_bytes=0, on_bad_utf8=config.on_bad_utf8
            )


def _check_column(file: SourceFile, schema: pa.Schema, name: str) -> None:
    if name not in schema.names:
        known = ", ".join(schema.names)
        raise DataError(f"{file.path} must have the column {name!r}, got {known}; set text_field")
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{file.path}: column {name!r} must hold strings, got {kind}")
