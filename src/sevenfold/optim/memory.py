"""What Muon holds at the highest point of an update, by arithmetic alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sevenfold.optim.muon import batches

_FP32, _BF16 = 4, 2


class HeldMatrix(NamedTuple):
    """A matrix, or stacked ones, as one rank has them.

    shape: as the rank orthogonalises them: gathered from all that divide them.
    own: elements that the rank keeps.
    is_copied: whether its part of the result is a copy, not a view.
    """

    shape: tuple[int, ...]
    own: int
    is_copied: bool


def muon_update_bytes(groups: Sequence[Sequence[HeldMatrix]]) -> int:
    """Count what an update on a GPU holds besides weights, gradients and momentum.

    Args:
        groups: matrices of each of the optimizer's groups, in its order.

    Returns:
        The bytes while the batch that takes most is orthogonalised, or its result written.
    """
    found = (_batch_bytes(batch) for group in groups for batch in batches(group, _shape))
    return max(found, default=0)


def _shape(matrix: HeldMatrix) -> tuple[int, ...]:
    return matrix.shape


def _batch_bytes(batch: Sequence[HeldMatrix]) -> int:
    """Gathering, before anything is stacked, never takes the most."""
    whole = sum(math.prod(matrix.shape) for matrix in batch)
    M, N = batch[0].shape[-2:]
    gram = whole // max(M, N) * min(M, N)
    # What was gathered, stacked, and of the iteration X, the next X, A and b A + c A^2.
    iterating = (4 * whole + 2 * gram) * _BF16
    # What was gathered, stacked, the result; an update in fp32, and the one before.
    before, widest = 0, 0
    for matrix in batch:
        update = matrix.own * _FP32
        widest = max(widest, before + update + matrix.is_copied * matrix.own * _BF16)
        before = update
    return max(iterating, 3 * whole * _BF16 + widest)
