"""Making a checkpoint folder visible all at once, or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from sevenfold.config import CheckpointError
from sevenfold.models.checkpoint.schema import CONFIG_FILE

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged_folder(path: Path, need_bytes: int, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling of `path` that becomes `path` when the block ends without an error.

    Whole checkpoints alone ever bear the name `path`. An older one is renamed aside, the new one
    renamed in, the older one deleted: after a kill at any point one of the two is whole, and the
    next save brings it back or clears away what is left.

    Args:
        path: the checkpoint to be.
        need_bytes: what it will take, for the message of a full disk.
        overwrite: replace a checkpoint that is there.

    Raises:
        CheckpointError: `path` exists, is no checkpoint, or cannot be written.
    """
    with _writing(path, need_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        _require_free(path, overwrite)
        staging = _sibling(path, "partial")
        staging.mkdir()
        try:
            with _locked(staging):
                yield staging
                _sync_folder(staging)
                _publish(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _writing(path: Path, need_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise CheckpointError(
                f"{path}: the disk must have {need_bytes:,} bytes free for the checkpoint, got: "
                f"{error.strerror}; free space or choose another disk"
            ) from error
        raise CheckpointError(f"{path} must be writable, got: {error}") from error


def _require_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    empty = path.is_dir() and not any(path.iterdir())
    if empty:
        return
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} must be new, empty or an earlier checkpoint, got something without "
            f"{CONFIG_FILE}; choose another path"
        )
    if not overwrite:
        raise CheckpointError(f"{path} must be new, got an existing checkpoint; pass overwrite")


def _publish(staging: Path, path: Path) -> None:
    aside = _sibling(path, "replaced")
    if path.exists():
        path.rename(aside)
    try:
        staging.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _clean_up(path: Path) -> None:
    """Undo what a killed save left: bring an older checkpoint back, delete what is in part."""
    for aside in _siblings(path, "replaced"):
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    for staging in _siblings(path, "partial"):
        with _locked(staging) as is_ours:
            if is_ours:
                shutil.rmtree(staging)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{uuid4().hex[:8]}")


def _siblings(path: Path, kind: str) -> list[Path]:
    prefix = f".{path.name}.{kind}-"
    return sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(prefix))


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, which the end of the process undoes; False while another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except BlockingIOError:
        is_ours = False
    try:
        yield is_ours
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
