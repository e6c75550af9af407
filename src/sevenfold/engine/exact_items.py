"""Fp32 states and their snapshots, copied whole."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ExactItems(NamedTuple):
    """All layers of each state and of each snapshot, both [items, bytes], alike within.

    counts: [items, layers * H] int32, of the tokens in the rings of each state; None without rings.
    """

    states: Tensor
    snapshots: Tensor
    counts: Tensor | None

    def restore(self, snapshots: Sequence[int], states: Sequence[int]) -> None:
        """Copy snapshots into states, which lack nothing then."""
        _copy_items(self.snapshots, snapshots, self.states, states)
        if self.counts is not None:
            for state in states:
                self.counts[state].zero_()

    def snapshot(self, states: Sequence[int], snapshots: Sequence[int]) -> None:
        """Copy states into snapshots."""
        _copy_items(self.states, states, self.snapshots, snapshots)


def _copy_items(
    source: Tensor, sources: Sequence[int], target: Tensor, targets: Sequence[int]
) -> None:
    """Copy items one by one: megabytes each, so that few copies beat their gathering."""
    for a, b in zip(sources, targets, strict=True):
        target[b].copy_(source[a])
