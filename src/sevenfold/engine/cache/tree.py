"""The tree of cached prefixes: a node a block of tokens, with its page, and anchors on some nodes.

An anchor is a place from which a request can go on: a node whose state is kept as a snapshot or, in
a model without linear layers, any node that is worth keeping. What no anchor can reach, and no
request uses, is dropped at once; so a leaf always has one or the other.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from sevenfold.engine.cache.arena import Arena
from sevenfold.engine.cache.eviction import EvictionQueue
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant


class Node:
    """One block of tokens after those of its parent.

    page: its keys and values; None in a model without softmax layers. refs: open requests and
    sessions whose path ends here. pinned: whether the arena counts its page as one that must stay,
    as it does those of all nodes above a pinned one; num_pinned: how many of its children are.
    is_followed: whether it has or had children. first_block: the unsalted key of a first block,
    else None.
    """

    __slots__ = (
        "anchor",
        "first_block",
        "is_followed",
        "key",
        "num_children",
        "num_pinned",
        "num_tokens",
        "page",
        "parent",
        "pinned",
        "refs",
    )

    def __init__(
        self, key: bytes, parent: "Node | None", page: int | None, num_tokens: int
    ) -> None:
        self.key, self.parent, self.page, self.num_tokens = key, parent, page, num_tokens
        self.num_children = self.num_pinned = self.refs = 0
        self.pinned = self.is_followed = False
        self.anchor: Anchor | None = None
        self.first_block: bytes | None = None


class Anchor:
    """A place to go on from; snapshot is None in a model without linear layers.

    pins: requests that are reading the snapshot. num_hits: how often it has been matched.
    """

    __slots__ = ("floor", "node", "num_hits", "pins", "snapshot", "ticket")

    def __init__(self, node: Node, snapshot: int | None) -> None:
        self.node, self.snapshot = node, snapshot
        self.pins = self.num_hits = self.ticket = 0
        self.floor = 0.0

    @property
    def alive(self) -> bool:
        """Whether it is still in the tree."""
        return self.node.anchor is self


class PrefixTree:
    """Nodes by key, and the order in which their anchors go.

    A path is locked at its end, and its pages stay pinned when it is unlocked, until relax: most
    often it is the next turn of the same chat that asks for them, and neither goes block by block.

    Args:
        arena: holds the pages and snapshots, which the tree gives back.
        plan: sizes and costs.
        forgotten: told the key of each node that is dropped.
        evicted: told each anchor that has to make room, before it is dropped, with its value.
    """

    def __init__(
        self,
        arena: Arena,
        plan: MemoryPlan,
        forgotten: Callable[[bytes], None],
        evicted: Callable[[Anchor, float], None] | None = None,
    ) -> None:
        self.queue: EvictionQueue[Anchor] = EvictionQueue(self._value)
        self.num_evicted = 0
        self.num_dropped_pages = 0
        self._arena, self._plan, self._forgotten = arena, plan, forgotten
        self._evicted = evicted
        self._nodes: dict[bytes, Node] = {}
        self._first_blocks: Counter[bytes] = Counter()
        self._owners: dict[int, Anchor] = {}
        # Where relax begins: pinned nodes that were the ends of what needed to be.
        self._loose: dict[Node, None] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, key: bytes) -> Node | None:
        """Return the node of a key, or None."""
        return self._nodes.get(key)

    def holds(self, node: Node) -> bool:
        """Whether a node has not been dropped; then those above it have not either."""
        return self._nodes.get(node.key) is node

    def along(self, keys: Iterable[bytes]) -> list[Node]:
        """Return the nodes of keys, up to the first that has none."""
        nodes, found = [], self._nodes
        for key in keys:
            node = found.get(key)
            if node is None:
                break
            nodes.append(node)
        return nodes

    def knows_first_block(self, unsalted: bytes) -> bool:
        """Whether any caller's tree begins with that block."""
        return unsalted in self._first_blocks

    def grow(self, parent: Node | None, key: bytes, page: int | None) -> Node:
        """Add a node that is not there behind a locked path, whose lock passes on to it.

        It owns its page, which is pinned.
        """
        above = parent.num_tokens if parent else 0
        node = Node(key, parent, page, above + self._plan.page_tokens)
        node.refs, node.pinned = 1, True
        self._nodes[key] = node
        if parent:
            parent.num_children += 1
            parent.is_followed = True
            parent.num_pinned += 1
            parent.refs -= 1
        return node

    def follow(self, node: Node) -> None:
        """Let a locked path go on to a node that is there already."""
        self.lock((node,))
        if node.parent:
            node.parent.refs -= 1

    def name_first_block(self, node: Node, unsalted: bytes) -> None:
        """Note a first block's unsalted key until the node is dropped."""
        node.first_block = unsalted
        self._first_blocks[unsalted] += 1

    def lock(self, path: Sequence[Node]) -> None:
        """Keep a whole path for a request; all of it but its end may be left out."""
        if not path:
            return
        node: Node | None = path[-1]
        path[-1].refs += 1
        pages = []
        while node and not node.pinned:
            node.pinned = True
            if node.page is not None:
                pages.append(node.page)
            node = node.parent
            if node:
                node.num_pinned += 1
        if pages:
            self._arena.pin(Tenant.PAGE, pages)

    def unlock(self, path: Sequence[Node]) -> None:
        """Give back a whole path; drops what nothing can reach any more."""
        if path:
            path[-1].refs -= 1
            self._loosen(path[-1])
            self._prune(path[-1])

    def relax(self) -> bool:
        """Unpin the pages that no request uses any more; returns whether there were any."""
        loose, pages = self._loose, []
        self._loose = {}
        for end in loose:
            node: Node | None = end
            while node and _is_loose(node):
                node.pinned = False
                if node.page is not None:
                    pages.append(node.page)
                node = node.parent
                if node:
                    node.num_pinned -= 1
        self._arena.unpin(Tenant.PAGE, pages)
        return bool(pages)

    def anchor(self, node: Node, snapshot: int | None) -> Anchor:
        """Make a node, which is no anchor, a place to go on from; it owns its snapshot, pinned."""
        node.anchor = anchor = Anchor(node, snapshot)
        if snapshot is not None:
            self._owners[snapshot] = anchor
            self._arena.unpin(Tenant.SNAPSHOT, (snapshot,))
        self.queue.touch(anchor)
        return anchor

    def hit(self, anchor: Anchor) -> None:
        """Note that a request goes on from an anchor."""
        anchor.num_hits += 1
        anchor.floor = self.queue.floor

    def pin(self, anchor: Anchor) -> None:
        """Keep an anchor's snapshot until what reads it is launched, or nobody will."""
        anchor.pins += 1
        if anchor.pins == 1 and anchor.snapshot is not None:
            self._arena.pin(Tenant.SNAPSHOT, (anchor.snapshot,))
            self.queue.remove(anchor)

    def unpin(self, anchor: Anchor) -> None:
        """Note that what reads an anchor's snapshot is launched, or that nothing will."""
        anchor.pins -= 1
        if anchor.pins == 0 and anchor.snapshot is not None:
            self._arena.unpin(Tenant.SNAPSHOT, (anchor.snapshot,))
            self.queue.add(anchor)

    def withdraw(self, anchor: Anchor) -> int | None:
        """Take an anchor, which nobody reads, out of the tree; returns its snapshot, pinned."""
        self.queue.remove(anchor)
        anchor.node.anchor = None
        if anchor.snapshot is not None:
            del self._owners[anchor.snapshot]
            self._arena.pin(Tenant.SNAPSHOT, (anchor.snapshot,))
        self._prune(anchor.node)
        return anchor.snapshot

    def drop(self, anchor: Anchor) -> None:
        """Remove an anchor, which nobody reads, and what only it could reach."""
        snapshot = self.withdraw(anchor)
        if snapshot is not None:
            self._arena.release(Tenant.SNAPSHOT, (snapshot,))

    def evict(self, *, whole_slab: bool = False) -> bool:
        """Remove the anchor that goes first.

        Args:
            whole_slab: also remove those whose snapshots keep its slab from coming free. Nothing
                less will do for a state: by value alone, the snapshots of many slabs would go
                before all of one had.

        Returns:
            False when no removal would free anything.
        """
        while (anchor := self.queue.pop()) is not None:
            if self._frees(anchor):
                for each in (anchor, *(self._slab_mates(anchor) if whole_slab else ())):
                    self.num_evicted += 1
                    if self._evicted is not None:
                        self._evicted(each, self._value(each))
                    self.drop(each)
                return True
        return False

    def value_of(self, node: Node) -> float:
        """FLOPs that a snapshot on a node would save beyond the anchor before it, for each byte."""
        above, pages, alone = node, 0, node.num_children == 0
        while above is not None and (above is node or above.anchor is None):
            alone = alone and (above is node or above.num_children == 1)
            pages += alone
            above = above.parent
        cost = self._plan.cost
        saved = cost.flops(node.num_tokens) - cost.flops(above.num_tokens if above else 0)
        freed = self._plan.snapshot_bytes + pages * self._plan.page_bytes
        return saved / max(freed, 1)

    def _value(self, anchor: Anchor) -> float:
        return self.value_of(anchor.node)

    def _slab_mates(self, anchor: Anchor) -> list[Anchor]:
        """The other anchors of a slab of snapshots; none when not all of them can be removed."""
        if anchor.snapshot is None:
            return []
        others = self._arena.neighbours(Tenant.SNAPSHOT, anchor.snapshot)
        owners = [self._owners.get(other) for other in others]
        mates = [owner for owner in owners if owner is not None and not owner.pins]
        return mates if len(mates) == len(others) else []

    def _frees(self, anchor: Anchor) -> bool:
        """Whether removing an anchor frees bytes; if not, it is queued again when it does."""
        if anchor.snapshot is not None:
            return anchor.pins == 0
        return anchor.node.num_children == 0 and anchor.node.refs == 0

    def _prune(self, node: Node | None) -> None:
        """Drop a node that nothing reaches, then its parent if that was its last use."""
        while node and node.refs == 0 and node.num_children == 0 and node.anchor is None:
            del self._nodes[node.key]
            self._forgotten(node.key)
            if node.page is not None:
                self._arena.release(Tenant.PAGE, (node.page,))
                self.num_dropped_pages += 1
            if node.first_block is not None:
                self._first_blocks[node.first_block] -= 1
                if not self._first_blocks[node.first_block]:
                    del self._first_blocks[node.first_block]
            self._loose.pop(node, None)
            pinned, node = node.pinned, node.parent
            if node:
                node.num_children -= 1
                node.num_pinned -= pinned
        if node:
            self._loosen(node)
        # A leaf's anchor now frees its pages too, or frees something at last.
        if node and node.anchor is not None and self._frees(node.anchor):
            self.queue.add(node.anchor)

    def _loosen(self, node: Node) -> None:
        """Note a node that may be pinned no more."""
        if _is_loose(node):
            self._loose[node] = None


def _is_loose(node: Node) -> bool:
    return node.pinned and not node.refs and not node.num_pinned
