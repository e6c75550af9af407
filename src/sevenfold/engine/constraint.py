"""Outputs that must keep to a grammar: masks over the tokens that may come next."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Constraint(Protocol):
    """Which tokens may come next in one output; it advances with the output."""

    def fill(self, mask: np.ndarray) -> None:
        """Write the allowed tokens, one bit each, into a row [ceil(vocab_size / 32)] int32."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; False if it may not follow."""
        ...

    def finished(self) -> bool:
        """Whether nothing more can follow, so that the output ends."""
        ...

    def problem(self) -> str | None:
        """What keeps it from knowing what may come next, for the caller; None if nothing does."""
        ...


def mask_logits(logits: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """Forbid what the constraints forbid.

    Args:
        logits: [N, vocab_size] fp32; it stays as it is.
        constraints: one for each row; None allows all.

    Returns:
        [N, vocab_size] with -inf where a token may not come next. A row that allows none stays as
        it was: its constraint will not accept what is chosen.
    """
    rows = [n for n, constraint in enumerate(constraints) if constraint is not None]
    if not rows:
        return logits
    vocab_size = logits.shape[-1]
    masks = np.zeros((len(rows), -(-vocab_size // 32)), dtype=np.int32)
    for mask, n in zip(masks, rows, strict=True):
        constraint = constraints[n]
        if constraint is not None:
            constraint.fill(mask)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    bits[~bits.any(axis=1)] = 1
    allowed = torch.from_numpy(bits.astype(bool)).to(logits.device)
    at = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, at, logits[at].masked_fill(~allowed, -math.inf))
