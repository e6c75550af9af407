"""Writing token shards: a raw token file and the int64 offsets of its documents."""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from sevenfold.data.manifest import ShardRecord, Split, SplitRecord, TokenType


class SplitWriter:
    """Appends documents to the shards of one split.

    A shard is closed by the document that brings it to `tokens_per_shard`; no document lies in
    two shards. As a context manager it closes the open file when the block fails. Memory: 8 bytes
    per document of the open shard.

    Args:
        folder: where the files go.
        split: the split's name, the beginning of each file name.
        dtype: the token type.
        tokens_per_shard: size from which the next document opens a new shard.
    """

    def __init__(
        self, folder: Path, split: Split, *, dtype: TokenType, tokens_per_shard: int
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokens_per_shard = tokens_per_shard
        self._shard: _OpenShard | None = None
        self._records: list[ShardRecord] = []
        self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.stream.close()

    @property
    def written_bytes(self) -> int:
        """Token bytes written so far."""
        closed = sum(record.num_tokens for record in self._records)
        opened = self._shard.num_tokens if self._shard else 0
        return (closed + opened) * self._dtype.itemsize

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the open document."""
        if self._shard is None:
            self._shard = _OpenShard(self._folder, f"{self._split}-{len(self._records):05d}")
        self._shard.append(np.asarray(tokens, dtype=self._dtype))

    def end_document(self, text_bytes: int) -> None:
        """Close the open document, which stands for `text_bytes` bytes of UTF-8 text."""
        self._text_bytes += text_bytes
        if self._shard is None:
            raise ValueError("end_document must follow append, got a document without tokens")
        self._shard.end_document()
        if self._shard.num_tokens >= self._tokens_per_shard:
            self._close_shard()

    def finish(self) -> SplitRecord:
        """Close the last shard and describe the split."""
        self._close_shard()
        return SplitRecord(
            num_documents=sum(record.num_documents for record in self._records),
            num_tokens=sum(record.num_tokens for record in self._records),
            num_bytes=self._text_bytes,
            shards=tuple(self._records),
        )

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._records.append(self._shard.close())
            self._shard = None


class _OpenShard:
    def __init__(self, folder: Path, name: str) -> None:
        self._tokens_path = folder / f"{name}.bin"
        self._index_path = folder / f"{name}.idx.npy"
        self.stream: BinaryIO = self._tokens_path.open("wb")
        self._digest = hashlib.sha256()
        self._offsets = array("q", [0])
        self.num_tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        data = tokens.tobytes()
        self.stream.write(data)
        self._digest.update(data)
        self.num_tokens += len(tokens)

    def end_document(self) -> None:
        self._offsets.append(self.num_tokens)

    def close(self) -> ShardRecord:
        self.stream.close()
        np.save(self._index_path, np.asarray(self._offsets, dtype="<i8"))  # [documents + 1]
        return ShardRecord(
            tokens_file=self._tokens_path.name,
            index_file=self._index_path.name,
            num_documents=len(self._offsets) - 1,
            num_tokens=self.num_tokens,
            tokens_sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(self._index_path.read_bytes()).hexdigest(),
        )
