"""Which queries meet which keys in one block of softmax attention."""

from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """Packed sequences of queries and of keys.

    lengths: queries of each sequence, at least 1.
    key_lengths: keys of each, at least 1; the same as lengths where causal.
    scale: multiplies the scores.
    causal: whether a query sees the keys up to its own place, or all.
    """

    lengths: Sequence[int]
    key_lengths: Sequence[int]
    scale: float
    causal: bool
