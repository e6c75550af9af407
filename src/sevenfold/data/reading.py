"""The stream of documents behind all sources, in order."""

from collections.abc import Callable, Iterator, Sequence

from sevenfold.config import ConfigError, DataError
from sevenfold.data.documents import Document
from sevenfold.data.jsonl import read_jsonl
from sevenfold.data.parquet import read_parquet
from sevenfold.data.plain_text import read_text
from sevenfold.data.prepare_config import PrepareConfig
from sevenfold.data.sources import Kind, SourceFile, require_unchanged

_READERS: dict[Kind, Callable[[SourceFile, PrepareConfig], Iterator[Document]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "jsonl.gz": read_jsonl,
    "parquet": read_parquet,
}


def read_documents(
    files: Sequence[SourceFile], config: PrepareConfig
) -> Iterator[tuple[int, Document]]:
    """Yield every document with the number of its file; a file of zero bytes yields none.

    Raises:
        DataError: a file cannot be read, changed since it was found, or breaks its format's rule.
    """
    for number, file in enumerate(files):
        require_unchanged(file)
        for document in _read(file, config):
            _check_size(document, config)
            yield number, document


def refuse_options_without_effect(files: Sequence[SourceFile], config: PrepareConfig) -> None:
    """Raise if a reading option was set that no source can use.

    Raises:
        ConfigError: split_documents_bytes without plain text, or text_field without records.
    """
    kinds = {file.kind for file in files}
    if config.split_documents_bytes is not None and "text" not in kinds:
        raise ConfigError(
            f"split_documents_bytes must not be set without .txt or .md sources, "
            f"got {config.split_documents_bytes}; remove it"
        )
    default_field = PrepareConfig.model_fields["text_field"].default
    if config.text_field != default_field and kinds == {"text"}:
        raise ConfigError(
            f"text_field must not be set without JSONL or Parquet sources, "
            f"got {config.text_field!r}; remove it"
        )


def _read(file: SourceFile, config: PrepareConfig) -> Iterator[Document]:
    if file.num_bytes == 0:
        return
    try:
        yield from _READERS[file.kind](file, config)
    except OSError as error:
        raise DataError(f"{file.path} must be readable, got: {error.strerror or error}") from error


def _check_size(document: Document, config: PrepareConfig) -> None:
    size = len(document.utf8)
    if size > config.max_document_bytes:
        raise DataError(
            f"{document.place}: a document must be at most max_document_bytes "
            f"({config.max_document_bytes}), got {size} bytes; split it, or raise the limit"
        )
