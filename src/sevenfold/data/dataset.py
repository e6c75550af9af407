"""Reading a prepared dataset, no more of it than is asked for."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np

from sevenfold.config import DataError
from sevenfold.data.manifest import Manifest, ShardRecord, Split, SplitRecord, read_manifest
from sevenfold.data.token_file import TokenFile
from sevenfold.data.tokenizer import TOKENIZER_FILE, load_tokenizer, token_byte_lengths

_REMEDY = "restore the file, or prepare again with overwrite = true"
_BLOCK_BYTES = 1 << 20


class TokenDataset:
    """One split of a prepared dataset; open it with `TokenDataset.open`.

    Each document is its tokens and the end-of-text token. Nothing is read before it is asked for,
    and pickling hands on the path, so worker processes open the files themselves.

    Args:
        path: the dataset's folder.
        split: "train" or "validation".
        manifest: the dataset's manifest.
    """

    def __init__(self, path: Path, split: Split, manifest: Manifest) -> None:
        self.path = path
        self.split: Split = split
        self.manifest = manifest
        self._record = manifest.splits[split]
        self._tokens = [
            TokenFile(path / shard.tokens_file, manifest.dtype) for shard in self._record.shards
        ]
        self._offsets = [_map_offsets(path, shard) for shard in self._record.shards]
        counts = [shard.num_documents for shard in self._record.shards]
        self._first_document = list(accumulate(counts, initial=0))

    @classmethod
    def open(cls, path: Path, split: Split = "train") -> Self:
        """Open one split.

        Args:
            path: the folder that `prepare` made.
            split: "train" or "validation".

        Raises:
            DataError: a file is missing, damaged or of the wrong size, or the split is empty.
        """
        manifest = read_manifest(path)
        check_files(path, manifest)
        if manifest.splits[split].num_documents == 0:
            raise DataError(
                f"{path}: split {split!r} must hold a document, got none; "
                f"prepare more documents, or with a validation_fraction above 0"
            )
        return cls(path, split, manifest)

    def __reduce__(self) -> tuple[object, tuple[Path, Split]]:
        return type(self).open, (self.path, self.split)

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return self._record.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, with one end-of-text token per document."""
        return self._record.num_tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's text."""
        return self._record.num_bytes

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return self.manifest.vocab_size

    @property
    def end_of_text_id(self) -> int:
        """Id of the last token of every document."""
        return self.manifest.end_of_text_id

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the tokens of one document, or a stretch of them, read-only.

        Args:
            index: in [0, num_documents).
            start: first token, at most the document's length.
            stop: one past the last; None, or any beyond the end, is the end.

        Returns:
            [length] uint16 or uint32; a whole document ends with end_of_text_id.

        Raises:
            IndexError: there is no such document.
            DataError: its shard cannot be read any more.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"index must lie in [0, {self.num_documents}), got {index}")
        shard = bisect_right(self._first_document, index) - 1
        local = index - self._first_document[shard]
        first, end = self._offsets[shard][local : local + 2].tolist()
        last = end if stop is None else min(end, first + stop)
        return self._tokens[shard].read(min(first + start, last), last)

    def document_lengths(self) -> np.ndarray:
        """Return the tokens of every document, [num_documents] int64."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def token_byte_lengths(self) -> np.ndarray:
        """Return the UTF-8 bytes that each token stands for, [vocab_size] int32."""
        return token_byte_lengths(load_tokenizer(self.path))

    def verify(self) -> None:
        """Read every file of the split and compare it with the hashes of the manifest.

        Raises:
            DataError: a file differs; the message names it.
        """
        _verify_file(self.path / TOKENIZER_FILE, self.manifest.tokenizer_sha256)
        for shard in self._record.shards:
            _verify_file(self.path / shard.tokens_file, shard.tokens_sha256)
            _verify_file(self.path / shard.index_file, shard.index_sha256)


def check_files(path: Path, manifest: Manifest) -> None:
    """Raise if a file of a dataset is missing or has another size than its manifest says.

    Raises:
        DataError: naming the file.
    """
    _require_size(path / TOKENIZER_FILE, None)
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in _shards(list(manifest.splits.values())):
        _require_size(path / shard.tokens_file, shard.num_tokens * itemsize)
        _require_size(path / shard.index_file, None)


def _shards(records: Sequence[SplitRecord]) -> list[ShardRecord]:
    return [shard for record in records for shard in record.shards]


def _require_size(file: Path, num_bytes: int | None) -> None:
    if not file.is_file():
        raise DataError(f"{file} must exist, got no such file; {_REMEDY}")
    size = file.stat().st_size
    if num_bytes is not None and size != num_bytes:
        raise DataError(f"{file} must have {num_bytes} bytes, got {size}; {_REMEDY}")


def _map_offsets(path: Path, shard: ShardRecord) -> np.ndarray:
    file = path / shard.index_file
    try:
        offsets = np.load(file, mmap_mode="r")  # [num_documents + 1]
    except (ValueError, EOFError) as error:
        raise DataError(f"{file} must be a NumPy array, got: {error}; {_REMEDY}") from error
    expected = (shard.num_documents + 1,)
    if offsets.shape != expected or offsets[-1] != shard.num_tokens:
        raise DataError(
            f"{file} must hold {expected[0]} offsets that end with {shard.num_tokens}, "
            f"got shape {offsets.shape} and last {offsets.flat[-1]}; {_REMEDY}"
        )
    return offsets


def _verify_file(file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise DataError(f"{file} must have SHA-256 {sha256}, got {digest.hexdigest()}; {_REMEDY}")
