"""Which files a preparation reads."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sevenfold.config import DataError

Kind = Literal["text", "jsonl", "jsonl.gz", "parquet"]

_KIND_OF_SUFFIX: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".parquet": "parquet",
}
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Args:
        path: where it lies.
        kind: how to read it.
        num_bytes: its size on disk.
        modified_ns: its modification time, to notice a change during preparation.
    """

    path: Path
    kind: Kind
    num_bytes: int
    modified_ns: int


def find_sources(paths: Sequence[Path]) -> tuple[SourceFile, ...]:
    """Expand files and folders into the files to read, folders in sorted order.

    Args:
        paths: files and folders; names that begin with a dot are skipped inside folders.

    Returns:
        The files, in the order given.

    Raises:
        DataError: a path is missing, a suffix is unknown, a file comes twice, or there is no file.
    """
    files = [_describe(file) for path in paths for file in _expand(path)]
    if not files:
        raise DataError(f"sources must hold at least one file, got {_join(paths)}")
    seen: set[Path] = set()
    for file in files:
        resolved = file.path.resolve()
        if resolved in seen:
            raise DataError(f"sources must name each file once, got {file.path} twice")
        seen.add(resolved)
    return tuple(files)


def require_unchanged(file: SourceFile) -> None:
    """Raise if a source file no longer is the one that was found.

    Raises:
        DataError: its size or modification time changed, or it is gone.
    """
    now = _describe(file.path)
    if now != file:
        raise DataError(
            f"{file.path} must not change while it is prepared, got {now.num_bytes} bytes "
            f"after {file.num_bytes}; run again when nothing writes to it"
        )


def hash_source(file: SourceFile, advance: Callable[[int], None]) -> str:
    """Return the SHA-256 of a source file in hexadecimal.

    Args:
        file: the file.
        advance: called with the number of bytes just read.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for block in _blocks(file.path):
        digest.update(block)
        advance(len(block))
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror or error}") from error


def _expand(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            yield file


def _describe(path: Path) -> SourceFile:
    if not path.is_file():
        raise DataError(f"sources must exist, got {path}, which is no file or folder")
    stat = path.stat()
    return SourceFile(path, _kind(path), stat.st_size, stat.st_mtime_ns)


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = "".join(path.suffixes[-2:]).lower()
    kind = _KIND_OF_SUFFIX.get(suffix)
    if kind is None:
        known = ", ".join(_KIND_OF_SUFFIX)
        raise DataError(
            f"{path}: suffix must be one of {known}, got {suffix!r}; convert or leave out the file"
        )
    return kind


def _join(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
