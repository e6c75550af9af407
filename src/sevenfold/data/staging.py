"""Making an output folder visible all at once, or not at all."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from sevenfold.config import DataError
from sevenfold.data.manifest import MANIFEST_FILE

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def staged_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling of `out` that becomes `out` when the block ends without an error.

    The step is one rename. With `overwrite` the old dataset is moved aside first and deleted
    last, so that at each moment `out` is a whole dataset or absent. After any error the temporary
    folder is gone; only a killed process leaves one, named `.<out>.partial-<id>`.

    Raises:
        DataError: `out` appeared meanwhile, or cannot be written.
    """
    staging = out.with_name(f".{out.name}.partial-{uuid4().hex[:8]}")
    try:
        with writing(out):
            staging.mkdir(parents=True)
        yield staging
        _publish(staging, out, overwrite=overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def writing(out: Path, need_bytes: Callable[[], int | None] | None = None) -> Iterator[None]:
    """Turn a failure to write into a DataError with its remedy.

    Args:
        out: the output folder, for the message.
        need_bytes: estimates how many bytes the whole output takes, None when it cannot.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise DataError(
                f"{out} must be writable, got: {error.strerror or error}; choose another folder"
            ) from error
        need = need_bytes() if need_bytes else None
        size = "more room" if need is None else f"about {need:,} bytes"
        raise DataError(
            f"{out}: the disk must have {size} free for the dataset, got: {error.strerror}; "
            f"free space, or choose a folder on another disk"
        ) from error


def require_replaceable(out: Path) -> None:
    """Raise if `out` holds something that is no dataset, which nothing may delete.

    Raises:
        DataError: `out` is a file, or a folder with files but no manifest.
    """
    if out.is_file():
        raise DataError(f"out must be a folder, got the file {out}; choose another")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise DataError(
            f"out must be a new or empty folder or an earlier dataset, got {out}, "
            f"which has files but no {MANIFEST_FILE}; choose another folder"
        )


def _publish(staging: Path, out: Path, *, overwrite: bool) -> None:
    aside = out.with_name(f".{out.name}.replaced-{uuid4().hex[:8]}")
    with writing(out):
        if overwrite and out.exists():
            out.rename(aside)
        try:
            staging.rename(out)
        except OSError:
            if aside.exists():
                aside.rename(out)
            raise
    shutil.rmtree(aside, ignore_errors=True)
