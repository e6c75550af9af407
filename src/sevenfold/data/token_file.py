"""Reading tokens from a shard: a file that has gone bad is an error, and no end of the process.

Not a memory map: reading one whose file was cut, or whose disk fails, kills a process by SIGBUS.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from sevenfold.config import DataError


class TokenFile:
    """The tokens of one shard.

    Args:
        path: the file; it stays open as long as this object lives.
        dtype: "uint16" or "uint32", little endian.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop), read-only.

        Raises:
            DataError: the file cannot be read, or ends before.
        """
        size = self._dtype.itemsize
        wanted, at = (stop - start) * size, start * size
        found = bytearray()
        try:
            while len(found) < wanted:
                # One call returns 2 GB at most.
                part = os.pread(self._descriptor, wanted - len(found), at + len(found))
                if not part:
                    raise self._error(f"got its end after {at + len(found)} bytes")
                found += part
        except OSError as error:
            raise self._error(f"got: {error.strerror}") from error
        return np.frombuffer(bytes(found), self._dtype)

    def _error(self, got: str) -> DataError:
        return DataError(
            f"{self._path} must be readable, {got}; restore the file and start the run again: it "
            f"goes on where it stopped"
        )
