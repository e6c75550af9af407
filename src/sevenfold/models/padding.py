"""Padding in a batch: no router sees it, and no expert."""

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where a batch has padding, as the host knows it: to leave it out waits for no device.

    runs: of tokens and of padding by turns, tokens first; they sum to B * T.
    """

    runs: tuple[int, ...]

    @staticmethod
    def at(is_padding: np.ndarray) -> "Padding | None":
        """Return the padding of tokens [B, T]; None where there is none."""
        flat = is_padding.ravel()
        if not flat.any():
            return None
        borders = np.flatnonzero(np.diff(flat, prepend=False))
        return Padding(tuple(np.diff(borders, prepend=0, append=len(flat)).tolist()))

    def take_out(self, x: Tensor) -> Tensor:
        """Keep the n tokens of x [B * T, D]: a view where all padding lies behind them."""
        parts: list[Tensor] = list(x.split(self.runs)[::2])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def put_back(self, x: Tensor) -> Tensor:
        """The inverse of take_out, [B * T, D]: padding is zero."""
        parts = []
        for part, gap in zip_longest(x.split(self.runs[::2]), self.runs[1::2], fillvalue=0):
            parts += [part, x.new_zeros(gap, *x.shape[1:])]
        return torch.cat(parts)

    def tokens_of(self, num_stretches: int) -> tuple[int, ...]:
        """Count the tokens of each of some equal stretches of the batch."""
        is_token = np.repeat(np.arange(len(self.runs)) % 2 == 0, self.runs)
        return tuple(is_token.reshape(num_stretches, -1).sum(1).tolist())
