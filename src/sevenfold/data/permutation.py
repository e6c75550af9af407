"""A random permutation that is computed, not stored."""

from dataclasses import dataclass

import numpy as np

_ROUNDS = 8
_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Permutation:
    """A seeded permutation of range(size) with random access: a Feistel network on the indices.

    The network permutes [0, 4**k) with 4**k >= size; a value outside range(size) is put through
    again until it falls inside, which leaves a permutation of range(size).

    Args:
        size: number of elements, from 1 to 2**62.
        key: tuple of integers of any size; equal keys give equal permutations on every machine.

    Raises:
        ValueError: size lies outside its range.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002 (cycle walking).
    """

    size: int
    key: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 2**62:
            raise ValueError(f"size must lie in [1, 2**62], got {self.size}")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Return where indices go.

        Args:
            indices: any shape, integers in range(size).

        Returns:
            Same shape, int64.
        """
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        values = self._network(indices.astype(np.uint64), half)
        outside = values >= self.size
        while outside.any():
            values[outside] = self._network(values[outside], half)
            outside = values >= self.size
        return values.astype(np.int64)

    def _network(self, values: np.ndarray, half: int) -> np.ndarray:
        low_bits = np.uint64((1 << half) - 1)
        shift = np.uint64(half)
        left, right = values >> shift, values & low_bits
        for number in range(_ROUNDS):
            round_key = np.uint64(mix_key((*self.key, number)))
            left, right = right, left ^ (_mix(right ^ round_key) & low_bits)
        return (left << shift) | right


def mix_key(parts: tuple[int, ...]) -> int:
    """Return 64 well-mixed bits of several integers; their order matters."""
    state = 0
    for part in parts:
        state = _mix_int((state + _GOLDEN + part) & _MASK_64)
    return state


def _mix_int(value: int) -> int:
    # The finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014.
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _mix(values: np.ndarray) -> np.ndarray:
    # The same on arrays: unsigned products wrap.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
