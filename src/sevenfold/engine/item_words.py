"""Where states, snapshots and pages lie in the arena, in words of 8 bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant
from sevenfold.ops import copy_and_clear

_WORD = 8
# Pages that a launch clears: with 64 tokens each, of 700 new ones and of the 256 of an answer for
# which a request finds pages when it is opened.
MOST_CLEARED = 16
NOTHING = (0,) * (2 + MOST_CLEARED)


class ItemWords(NamedTuple):
    """The arena as words [W] int64, and the distances between items of each tenant.

    copied, cleared: words of a state and of a page.
    """

    words: Tensor
    state: int
    page: int
    snapshot: int
    copied: int
    cleared: int

    def places(self, pages: Sequence[int], snapshot: int | None, state: int | None) -> list[int]:
        """Return what `ready` reads, to clear so many pages at most and to read a state or none."""
        copied = [0, 0]
        if snapshot is not None and state is not None:
            copied = [snapshot * self.snapshot, state * self.state]
        rest = [0] * (MOST_CLEARED - len(pages))
        return [*copied, *[page * self.page for page in pages], *rest]

    def ready(self, places: Tensor) -> None:
        """Copy a snapshot into a state and clear pages, as numbers on the device say."""
        copy_and_clear(self.words, places, copied=self.copied, cleared=self.cleared)


def item_words(arena: Tensor, plan: MemoryPlan) -> ItemWords | None:
    """Return them for a plan whose states and snapshots are alike; None where words do not fit, or
    a state has a ring, which would have to be emptied besides."""
    strides = [plan.layout.stride_bytes(tenant) for tenant in Tenant]
    copied = plan.state.num_bytes if plan.has_states else 0
    uneven = any(size % _WORD for size in (arena.numel(), copied, *strides))
    if uneven or plan.ring_tokens or plan.state.sections != plan.snapshot.sections:
        return None
    state, page, snapshot = (size // _WORD for size in strides)
    words = arena.view(torch.int64)
    return ItemWords(words, state, page, snapshot, copied // _WORD, page)
