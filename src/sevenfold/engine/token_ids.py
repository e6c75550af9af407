"""Token ids of a prompt, packed once."""

import struct
from collections.abc import Iterable
from typing import Self


class TokenIds(tuple[int, ...]):
    """Token ids with their bytes, by which prompts are compared and hashed.

    To pack 32,848 ids takes some 130 us, and twice as long where other work has had the caches:
    whoever encodes a text packs them there, so that it is no part of the engine's thread.

    packed: 4 bytes each, little-endian.

    Args:
        ids: integers from 0 to 2**32 - 1.

    Raises:
        TypeError: one is no integer.
        ValueError: one is out of range.
    """

    packed: bytes

    def __new__(cls, ids: Iterable[int]) -> Self:
        """Check and pack them."""
        made = super().__new__(cls, ids)
        made.packed = _packed(made)
        return made


def _packed(ids: tuple[int, ...]) -> bytes:
    """The bytes, whose making also checks the ids: a look at each one's type takes four times as
    long.

    What is no id would fail inside a step, and with it all that the step computes.
    """
    try:
        return struct.Struct(f"<{len(ids)}I").pack(*ids)
    except struct.error as error:
        if not all(isinstance(token, int) for token in ids):
            raise TypeError("prompt must hold integers alone, got other types") from error
        raise ValueError(
            f"prompt must hold ids from 0 to 2**32 - 1, got {min(ids)} to {max(ids)}"
        ) from error
