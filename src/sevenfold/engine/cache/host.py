"""Prefixes that had to leave the device: their snapshots and pages in the host's memory.

An entry is an anchor that was evicted, with every page of its path: it needs nothing of the device
to be gone on from. Entries share the pages that their paths share. One that is gone on from stays
here too, so that it need not be copied again when it is evicted again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.engine.cache.arena import Arena, ArenaUsage, index_of
from sevenfold.engine.cache.eviction import EvictionQueue
from sevenfold.engine.cache.holding import Copy
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.cache.tree import Anchor, Node
from sevenfold.engine.memory_layout import ArenaLayout, Tenant


@dataclass(eq=False)
class _Block:
    """One block of a path. page: its keys and values; None in a model without softmax layers."""

    page: int | None
    num_entries: int = 0


@dataclass(eq=False)
class HostEntry:
    """A prefix: the keys of its blocks, and its snapshot; None in a model without linear layers.

    value: FLOPs that it saves for each byte. pins: until what is read of it has been copied.
    """

    keys: Sequence[bytes]
    snapshot: int | None
    value: float
    pins: int = 0
    floor: float = 0.0
    ticket: int = 0


@dataclass
class HostCounters:
    """What the host's memory has done: prefixes kept, refused, dropped, and gone on from.

    hit_tokens: that the device had not kept. copied_bytes: from the host for them.
    """

    num_kept: int = 0
    num_refused: int = 0
    num_evicted: int = 0
    num_hits: int = 0
    hit_tokens: int = 0
    copied_bytes: int = 0


class HostTier:
    """A second, larger arena whose items are copies."""

    def __init__(self, layout: ArenaLayout) -> None:
        self.counters = HostCounters()
        self._arena = Arena(layout)
        self._entries: dict[bytes, HostEntry] = {}
        self._blocks: dict[bytes, _Block] = {}
        self._queue: EvictionQueue[HostEntry] = EvictionQueue(lambda entry: entry.value)
        self._out: list[Copy] = []
        self._in: list[Copy] = []
        self._reading: list[HostEntry] = []

    def keep(self, anchor: Anchor, value: float) -> None:
        """Take over a prefix whose anchor is about to be dropped, if there is room for it.

        The device's items must stay as they are until the copies have been taken.
        """
        path = _path(anchor.node)
        entry = self._entries.get(path[-1].key)
        if entry is None:
            self._add(path, anchor.snapshot, value)
        elif not entry.pins:
            self._queue.touch(entry)

    def find(self, chain: KeyChain, most_blocks: int, least_blocks: int) -> HostEntry | None:
        """Return the longest prefix that is kept, of least_blocks to most_blocks, or None."""
        known = 0
        while known < most_blocks and chain.key(known) in self._blocks:
            known += 1
        for block in range(known, least_blocks - 1, -1):
            if block and (entry := self._entries.get(chain.key(block - 1))):
                return entry
        return None

    def pin(self, entry: HostEntry) -> None:
        """Keep an entry until unpin."""
        entry.pins += 1
        self._queue.remove(entry)

    def unpin(self, entry: HostEntry) -> None:
        """Let an entry go when its turn comes; it counts as used now."""
        entry.pins -= 1
        if not entry.pins:
            self._queue.touch(entry)

    def read(self, entry: HostEntry, pages: dict[bytes, int], snapshot: int | None) -> None:
        """Have an entry copied to items of the device, before the model runs next.

        Args:
            entry: one that is kept.
            pages: handles for those of its blocks that the device lacks.
            snapshot: a handle, if it has one.
        """
        self.counters.num_hits += 1
        for key, page in pages.items():
            own = self._blocks[key].page
            if own is not None:
                self._copy_in(Tenant.PAGE, page, own)
        if snapshot is not None and entry.snapshot is not None:
            self._copy_in(Tenant.SNAPSHOT, snapshot, entry.snapshot)
        self.pin(entry)
        self._reading.append(entry)

    def _copy_in(self, tenant: Tenant, item: int, own: int) -> None:
        self._in.append(Copy(tenant, index_of(item), index_of(own)))
        self.counters.copied_bytes += self._arena.layout.stride_bytes(tenant)

    def take_copies(self) -> tuple[list[Copy], list[Copy]]:
        """Return the copies to the host and those from it, once."""
        out, back = self._out, self._in
        self._out, self._in = [], []
        for entry in self._reading:
            self.unpin(entry)
        self._reading = []
        return out, back

    def clear(self) -> None:
        """Forget every prefix that is not being read."""
        while (entry := self._queue.pop()) is not None:
            self._drop(entry)
        if not self._entries:
            self._out = []

    def usage(self) -> ArenaUsage:
        """Return how the memory is used now."""
        return self._arena.usage()

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, path: list[Node], snapshot: int | None, value: float) -> None:
        while not self._try_to_add(path, snapshot, value):
            entry = self._queue.pop()
            if entry is None:
                self.counters.num_refused += 1
                return
            self.counters.num_evicted += 1
            self._drop(entry)

    def _try_to_add(self, path: list[Node], snapshot: int | None, value: float) -> bool:
        missing = [node for node in path if node.key not in self._blocks]
        with_page = [node for node in missing if node.page is not None]
        pages = self._arena.take(Tenant.PAGE, len(with_page)) if with_page else []
        if pages is None:
            return False
        own = self._arena.take(Tenant.SNAPSHOT) if snapshot is not None else [None]
        if own is None:
            self._arena.release(Tenant.PAGE, pages)
            return False
        self._blocks.update({node.key: _Block(None) for node in missing})
        for node, page in zip(with_page, pages, strict=True):
            self._blocks[node.key].page = page
            if node.page is not None:
                self._out.append(Copy(Tenant.PAGE, index_of(node.page), index_of(page)))
        if snapshot is not None and own[0] is not None:
            self._out.append(Copy(Tenant.SNAPSHOT, index_of(snapshot), index_of(own[0])))
        for node in path:
            self._blocks[node.key].num_entries += 1
        entry = HostEntry([node.key for node in path], own[0], value)
        self._entries[path[-1].key] = entry
        self._queue.touch(entry)
        self.counters.num_kept += 1
        return True

    def _drop(self, entry: HostEntry) -> None:
        """Forget an entry that is out of the queue, and the blocks that no other has."""
        del self._entries[entry.keys[-1]]
        if entry.snapshot is not None:
            self._arena.release(Tenant.SNAPSHOT, (entry.snapshot,))
        for key in entry.keys:
            block = self._blocks[key]
            block.num_entries -= 1
            if not block.num_entries:
                del self._blocks[key]
                if block.page is not None:
                    self._arena.release(Tenant.PAGE, (block.page,))


def _path(node: Node | None) -> list[Node]:
    """A node's path, first block first."""
    path = []
    while node is not None:
        path.append(node)
        node = node.parent
    return path[::-1]
