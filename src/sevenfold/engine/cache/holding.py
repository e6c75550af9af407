"""What one open request holds."""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.cache.lookup import Lookup
from sevenfold.engine.cache.trails import Path
from sevenfold.engine.cache.tree import Anchor, Node
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request


@dataclass(eq=False, slots=True)
class Holding:
    """What one open request holds; all but indices are handles of the arena.

    num_prompt_tokens: what was known when it was opened; prefill ends there.
    wanted: token counts of snapshots to write -> whether they are needed; None until a step comes
        to a page's border, where they all lie.
    path: nodes of the tree for its first blocks, which it keeps there; replaced when it grows, for
        others share it.
    page_indices: where the pages of all blocks lie, in their order, int64; replaced when they
        change, never written to.
    restored: the anchor that its state is read from, until that has happened.
    next_block_tokens: computed tokens with which path grows.
    own_pages: those that are not the tree's, of the blocks behind path.
    pending: token count -> snapshot being written.
    anchors: those that it has made.
    rolling: the last of them made while decoding, which the next one replaces.
    counted: whether its lookup is in the counters.
    """

    request: Request
    chain: KeyChain
    lookup: Lookup
    num_prompt_tokens: int
    path: list[Node]
    page_indices: array
    state: int | None
    restored: Anchor | None
    next_block_tokens: int
    own_pages: deque[int] = field(default_factory=deque)
    pending: dict[int, int] = field(default_factory=dict)
    anchors: list[Anchor] = field(default_factory=list)
    rolling: Anchor | None = None
    counted: bool = False
    wanted: dict[int, bool] | None = None

    @property
    def last_anchor_tokens(self) -> int:
        """Where the last state was kept, by this request or the one that it goes on from."""
        alive = [anchor.node.num_tokens for anchor in self.anchors if anchor.alive]
        return max(self.lookup.hit_tokens, *alive) if alive else self.lookup.hit_tokens

    @property
    def whole_path(self) -> Path:
        """Its path, behind whose pages its own may lie."""
        return Path(self.path, self.page_indices)


class Placement(NamedTuple):
    """Where a request lies: indices into the strided views of the arena.

    state: None in a model without linear layers. restore: the snapshot to read the state from
    before the first token is computed; None for a state of zeros, and once that has happened.
    snapshots: token count -> snapshot to write when the prefill or the step comes to it.
    """

    state: int | None
    restore: int | None
    snapshots: dict[int, int]


class Copy(NamedTuple):
    """A page or a snapshot that goes between the device and the host: their indices."""

    tenant: Tenant
    device: int
    host: int


class Fresh(NamedTuple):
    """What must happen to items before the model runs, in this order.

    saved: copied to the host. states, pages: zeroed. loaded: copied from the host.
    """

    states: list[int]
    pages: list[int]
    saved: Sequence[Copy] = ()
    loaded: Sequence[Copy] = ()


@dataclass
class CacheCounters:
    """What the prefix cache has done since it began.

    missed_tokens: tokens that requests computed although they had been seen before.
    """

    num_hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    missed_tokens: int = 0
    num_snapshots: int = 0
    num_refused_snapshots: int = 0
    num_evicted: int = 0
    num_dropped_pages: int = 0
    misses: dict[str, int] = field(default_factory=dict)
