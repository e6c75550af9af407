"""The manifest of a prepared dataset: what is in it, and what it was made from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sevenfold.config import DataError, StrictModel
from sevenfold.data.prepare_config import PrepareConfig

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
Split = Literal["train", "validation"]
TokenType = Literal["uint16", "uint32"]

# What does not change a byte of the result, or is represented by hashes of its content.
_NOT_IDENTITY = {"sources", "out", "overwrite", "tokenizer", "batch_bytes"}


class ShardRecord(StrictModel):
    """One pair of files: tokens, and the int64 offsets of its documents."""

    tokens_file: str
    index_file: str
    num_documents: int
    num_tokens: int
    tokens_sha256: str
    index_sha256: str


class SplitRecord(StrictModel):
    """One split; num_bytes is the UTF-8 text behind its tokens, for bits per byte."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: tuple[ShardRecord, ...]


class SourceRecord(StrictModel):
    """One input file and how many of its documents were kept."""

    path: str
    kind: str
    num_bytes: int
    sha256: str
    num_documents: int


class SkippedRecord(StrictModel):
    """What was left out, and what was kept although damaged."""

    empty_files: int
    empty_documents: int
    duplicate_documents: int
    documents_with_replacement_characters: int


class Manifest(StrictModel):
    """Everything about a prepared dataset that is not a token."""

    version: Literal[1]
    fingerprint: str
    dtype: TokenType
    vocab_size: int
    end_of_text: str
    end_of_text_id: int
    tokenizer_sha256: str
    splits: dict[Split, SplitRecord]
    sources: tuple[SourceRecord, ...]
    skipped: SkippedRecord
    config: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared dataset.

    Raises:
        DataError: it is missing, damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path} must be readable, got: {error.strerror}; "
            f"make the dataset with `sevenfold data prepare`"
        ) from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the whole"
        raise DataError(
            f"{path} must be a manifest of version {FORMAT_VERSION}, got a fault in {where}: "
            f"{fault['msg']}; prepare again with overwrite = true"
        ) from error


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest into a folder."""
    text = manifest.model_dump_json(indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def fingerprint(
    config: PrepareConfig, sources: Sequence[tuple[str, str]], tokenizer_sha256: str | None
) -> str:
    """Return a SHA-256 that is equal for two preparations with equal results.

    Args:
        config: the preparation; where its files lie does not count.
        sources: (kind, sha256) of each file, in order.
        tokenizer_sha256: hash of the given tokenizer, if one is given.
    """
    options = config.model_dump(mode="json", exclude=_NOT_IDENTITY)
    identity = [FORMAT_VERSION, options, list(sources), tokenizer_sha256]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()
