"""Where states, snapshots and pages lie in the arena, in words of 8 bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import SINK, Tenant
from sevenfold.ops import copy_and_clear

_WORD = 8
# Pages that a launch clears: with 64 tokens each, of 700 new ones and of the 256 of an answer for
# which a request finds pages when it is opened.
MOST_CLEARED = 16
NOTHING = (0,) * (1 + MOST_CLEARED)


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
        """Return what `ready` reads, of some new pages, and of a state and its snapshot if any."""
        read = SINK if state is None else state * self.state
        if snapshot is not None:
            read = snapshot * self.snapshot
        rest = [0] * (MOST_CLEARED - len(pages))
        return [read, *[page * self.page for page in pages], *rest]

    def new_state(self) -> Tensor:
        """Allocate what `ready` copies to."""
        return self.words.new_zeros(self.copied)

    def ready(self, copied: Tensor, places: Tensor) -> None:
        """Copy a state or a snapshot, and clear pages, as numbers on the device say.

        A recorded run reads the state at its copy, which stays where it is: to take it out of its
        own place would be a launch of each layer.
        """
        copy_and_clear(self.words, copied, places, cleared=self.cleared)


def state_of(copied: Tensor, states: Tensor) -> Tensor:
    """Return one layer's part [1, H, K, V] of a copied state; states: [S, H, K, V], the layer's."""
    at, size = states.storage_offset(), states[0].numel()
    return copied.view(states.dtype)[at : at + size].view(1, *states.shape[1:])


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
