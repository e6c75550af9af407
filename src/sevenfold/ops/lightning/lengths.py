"""Lengths of packed sequences, read from their borders and checked."""

from itertools import pairwise

from torch import Tensor


def read_lengths(B: int, T: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Return the tokens of each sequence; waits for the device where the borders lie on one.

    Args:
        B, T: rows and tokens of a row; B is 1 where there are borders.
        cu_seqlens: [N + 1] int32, or None when every row is a sequence.

    Raises:
        ValueError: the borders do not run from 0 to T, or fall.
    """
    if cu_seqlens is None:
        return (T,) * B
    borders = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in pairwise(borders))
    if not lengths or borders[0] != 0 or borders[-1] != T:
        raise ValueError(f"cu_seqlens must run from 0 to T = {T}, got {borders}")
    if min(lengths) < 0:
        raise ValueError(f"cu_seqlens must never fall, got {borders}")
    return lengths
