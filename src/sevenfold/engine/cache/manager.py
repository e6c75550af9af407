"""The cache manager: memory of open requests and of the prefixes that later ones go on from."""

from array import array
from dataclasses import replace

from sevenfold.engine.cache.admission import PromptPlaces, decode_snapshot, wanted_snapshots
from sevenfold.engine.cache.arena import ArenaUsage, index_of
from sevenfold.engine.cache.holding import CacheCounters, Fresh, Holding, Placement
from sevenfold.engine.cache.host import HostCounters
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.cache.lookup import Lookup
from sevenfold.engine.cache.opening import Opening, num_matched_tokens
from sevenfold.engine.cache.tree import Node
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request

# In a model without linear layers a path may be cut back to each so many blocks.
_ANCHOR_BLOCKS = 16


class CacheManager(Opening):
    """Gives memory to requests and keeps the prefixes that they leave.

    A request's num_computed_tokens says what the model has computed: blocks and snapshots up to it
    are offered to others, later ones to nobody. It must be 0, or what open returned, before the
    first chunk has run.

    Args:
        plan: the budget and how it is cut.
        headroom_tokens: output for which a request gets pages when it is opened, doubled by each of
            its preemptions: as much as the scheduler asks for, default 256.
        grain_tokens: keep and offer only what whole chunks of so many tokens of a prompt have
            computed, so that what is found is bit for bit what would be computed; None keeps
            outputs too, by pages.
    """

    def __init__(
        self, plan: MemoryPlan, *, headroom_tokens: int = 256, grain_tokens: int | None = None
    ) -> None:
        super().__init__(plan, headroom_tokens=headroom_tokens, grain_tokens=grain_tokens)
        self._counters = CacheCounters()

    def open(self, request: Request) -> int | None:
        """Match the longest prefix to go on from; take a state, and pages for tokens and headroom.

        Args:
            request: not open.

        Returns:
            The tokens already computed, 0 on a miss; None when memory does not suffice now, and
            then nothing is taken and nothing evicted.

        Raises:
            ValueError: the request is open.
        """
        if request.id in self._holdings:
            raise ValueError(f"request must not be open to be opened, got {request.id!r}")
        self._settle_all()
        chain = KeyChain(request, self.plan.page_tokens)
        found = self._index.match(chain, num_matched_tokens(request))
        holding = self._admit_from_host(request, chain, found)
        holding = holding or self._admit(request, chain, found)
        if holding is None:
            return None
        self._holdings[request.id] = holding
        return holding.lookup.hit_tokens

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Take pages until the request has room for that many tokens in all.

        Args:
            request: open.
            num_tokens: tokens that will have keys and values.

        Returns:
            False when memory is out, and then no page is taken and nothing evicted.

        Raises:
            ValueError: the request is not open.
        """
        holding = self._holding(request)
        missing = self.plan.num_pages(num_tokens) - len(holding.page_indices)
        if missing <= 0:
            return True
        self._settle(holding)
        pages = self._obtain(Tenant.PAGE, missing)
        if pages is None:
            return False
        self._give_pages(holding, pages)
        return True

    def snapshots_due(self, request: Request, first: int, end: int) -> list[int]:
        """Reserve snapshots for the tokens that a step computes.

        Args:
            request: open, with pages up to end.
            first, end: the step computes tokens [first, end); in decoding with drafts, at most.

        Returns:
            Token counts in (first, end], rising, all of them multiples of page_tokens, after which
            to write the state into the snapshots that placement names. A count that the step does
            not come to (rejected drafts) is named again.

        Raises:
            ValueError: the request is not open.
        """
        holding, page = self._holding(request), self.plan.page_tokens
        if first // page == end // page or not self.plan.has_states:
            return []
        due = []
        for at, needed in self._wanted(holding).items():
            if first < at <= end and self._reserve(holding, at, needed=needed):
                due.append(at)
        if self._grain_tokens is not None:
            return sorted(due)
        at = decode_snapshot(max(first, holding.num_prompt_tokens), end, page)
        if at is not None and self._reserve_rolling(holding, at):
            due.append(at)
        return sorted(due)

    def close(self, request: Request, *, keep: bool) -> None:
        """Give everything back now.

        Args:
            request: open.
            keep: let the prefix cache own computed blocks and snapshots that it can use later;
                False takes back what it got from this request, but for what others already use.

        Raises:
            ValueError: the request is not open.
        """
        holding = self._holding(request)
        if keep:
            self._settle(holding)
            if holding.path and not self.plan.has_states:
                self._anchor(holding, holding.path[-1], None)
            self._trails.leave(holding.whole_path, holding.chain)
        del self._holdings[request.id]
        if holding.restored is not None:
            self._tree.unpin(holding.restored)
        if not keep:
            for anchor in holding.anchors:
                if anchor.alive and not anchor.pins:
                    self._tree.drop(anchor)
        self._arena.release(Tenant.SNAPSHOT, holding.pending.values())
        self._tree.unlock(holding.path)
        self._arena.release(Tenant.PAGE, holding.own_pages)
        if holding.state is not None:
            self._arena.release(Tenant.STATE, (holding.state,))

    def lookup(self, request: Request) -> Lookup:
        """Return what an open request found when it was opened."""
        return self._holding(request).lookup

    def placement(self, request: Request) -> Placement:
        """Return where an open request's state and snapshots lie."""
        holding = self._holding(request)
        self._settle(holding)
        restored = holding.restored.snapshot if holding.restored else None
        return Placement(
            state=None if holding.state is None else index_of(holding.state),
            restore=None if restored is None else index_of(restored),
            snapshots={at: index_of(handle) for at, handle in holding.pending.items()},
        )

    def note_launched(self, request: Request) -> None:
        """Note that an open request's first chunk runs: whatever writes to the snapshot that it
        reads comes behind it, in the order of the device's stream."""
        self._use_found(self._holding(request))

    def state(self, request: Request) -> int | None:
        """Return where an open request's state lies; None in a model without linear layers."""
        state = self._holding(request).state
        return None if state is None else index_of(state)

    def pages(self, request: Request, first: int = 0) -> array:
        """Return the indices of an open request's pages, from its page number first on.

        An array of 64-bit integers, which costs no loop over thousands of pages at every step. It
        is not written to any more: as long as the same array comes back, the pages are the same.
        """
        indices = self._holding(request).page_indices
        return indices[first:] if first else indices

    def take_fresh(self) -> Fresh:
        """Return the items to be zeroed before the model runs, once."""
        fresh, self._fresh = self._fresh, Fresh([], [])
        if self._host is None:
            return fresh
        saved, loaded = self._host.take_copies()
        return fresh._replace(saved=saved, loaded=loaded)

    def clear(self) -> None:
        """Forget every prefix that no open request uses."""
        self._trails.clear()
        while self._tree.evict():
            pass
        if self._host is not None:
            self._host.clear()

    def usage(self) -> ArenaUsage:
        """Return how the arena is used now; pages stay among the pinned until it matters."""
        return self._arena.usage()

    def num_pinned_items(self) -> tuple[int, ...]:
        """Return how many items no eviction can free, by Tenant."""
        self._tree.relax()
        return self._arena.usage().num_pinned_items

    def host_usage(self) -> ArenaUsage | None:
        """Return how the host's memory is used now; None without any."""
        return None if self._host is None else self._host.usage()

    def host_counters(self) -> HostCounters | None:
        """Return what the host's memory has done, copied; None without any."""
        return None if self._host is None else replace(self._host.counters)

    def counters(self) -> CacheCounters:
        """Return what the prefix cache has done, copied."""
        tree = self._tree
        return replace(
            self._counters,
            misses=dict(self._counters.misses),
            num_evicted=tree.num_evicted,
            num_dropped_pages=tree.num_dropped_pages,
        )

    def _holding(self, request: Request) -> Holding:
        holding = self._holdings.get(request.id)
        if holding is None or holding.request is not request:
            raise ValueError(f"request must be open, got {request.id!r}, which is not")
        return holding

    def _obtain(self, tenant: Tenant, count: int) -> list[int] | None:
        """Take items, evicting what must go; None when that would not be enough."""
        needs = [0, 0, 0]
        needs[tenant] = count
        if not self._suffices((needs[0], needs[1], needs[2])):
            self._settle_all()
            if not self._suffices((needs[0], needs[1], needs[2])):
                return None
        return self._take(tenant, count)

    def _wanted(self, holding: Holding) -> dict[int, bool]:
        """Where a prompt's prefill should write snapshots, and whether they are needed."""
        if holding.wanted is None:
            marks, seen = holding.request.marks, holding.lookup.seen_tokens
            places = PromptPlaces(holding.num_prompt_tokens, marks, seen, holding.lookup.hit_tokens)
            holding.wanted = wanted_snapshots(places, self._grain_tokens or self.plan.page_tokens)
        return holding.wanted

    def _reserve(self, holding: Holding, at: int, *, needed: bool) -> bool:
        """Reserve a snapshot unless there is one, or will be, or there is no memory for it."""
        if at in holding.pending:
            return True
        node = self._node_at(holding, at)
        if (node is not None and node.anchor is not None) or self._is_written(holding, at):
            return False
        handles = self._obtain(Tenant.SNAPSHOT, 1) if needed else self._take_spare(holding, at)
        return self._note_pending(holding, at, handles)

    def _node_at(self, holding: Holding, at: int) -> Node | None:
        """The node of a prompt's block that ends there, if the tree has it: hashed if need be."""
        block, path = at // self.plan.page_tokens - 1, holding.path
        if block < len(path):
            return path[block]
        if path and not path[-1].num_children:
            return None
        return self._tree.get(holding.chain.key(block))

    def _is_written(self, holding: Holding, at: int) -> bool:
        """Whether another prompt's prefill writes the same snapshot: of many one is enough."""
        block = at // self.plan.page_tokens - 1
        return any(
            one.chain.key(block) == holding.chain.key(block)
            for one in self._holdings.values()
            if at in one.pending and at <= one.num_prompt_tokens
        )

    def _reserve_rolling(self, holding: Holding, at: int) -> bool:
        """Reserve a snapshot in place of the one before it, if nobody has used that."""
        if at in holding.pending:
            return True
        last = holding.rolling
        if last is not None and last.alive and not last.num_hits and not last.pins:
            holding.anchors.remove(last)
            snapshot = self._tree.withdraw(last)
            return self._note_pending(holding, at, None if snapshot is None else [snapshot])
        return self._note_pending(holding, at, self._take_spare(holding, at))

    def _note_pending(self, holding: Holding, at: int, handles: list[int] | None) -> bool:
        if handles is None:
            self._counters.num_refused_snapshots += 1
            return False
        holding.pending[at] = handles[0]
        return True

    def _take_spare(self, holding: Holding, at: int) -> list[int] | None:
        """Take a snapshot if one is free, or if what is worth less holds it."""
        plan = self.plan
        if not self._suffices((0, 0, 1)):
            return None
        before = max(holding.last_anchor_tokens, *(n for n in (0, *holding.pending) if n < at))
        saved = plan.cost.flops(at) - plan.cost.flops(min(before, at))
        freed = plan.snapshot_bytes + plan.num_pages(max(0, at - before)) * plan.page_bytes
        while (handles := self._arena.take(Tenant.SNAPSHOT)) is None:
            if not self._tree.queue.outranks_first(saved / freed) or not self._tree.evict():
                return None
        return handles

    def _settle_all(self) -> None:
        """Offer what the last step has computed to others."""
        for holding in self._holdings.values():
            self._settle(holding)

    def _settle(self, holding: Holding) -> None:
        """Offer what a request has computed to others, and let go of what it has read."""
        computed = holding.request.num_computed_tokens
        if computed > holding.lookup.hit_tokens:
            self._use_found(holding)
        if computed >= holding.next_block_tokens:
            self._publish(holding, self._num_offered(holding, computed) // self.plan.page_tokens)
        if holding.pending:
            for at in [at for at in holding.pending if at <= computed]:
                self._keep_snapshot(holding, at)

    def _use_found(self, holding: Holding) -> None:
        """Count what a request has gone on from, and let go of the snapshot that it has read."""
        if holding.counted:
            return
        self._count(holding)
        if holding.restored is not None:
            self._tree.unpin(holding.restored)
            holding.restored = None

    def _num_offered(self, holding: Holding, computed: int) -> int:
        """Tokens that others may go on from."""
        if self._grain_tokens is None:
            return computed
        whole = min(computed, holding.num_prompt_tokens)
        return whole // self._grain_tokens * self._grain_tokens

    def _publish(self, holding: Holding, num_blocks: int) -> None:
        """Put blocks into the tree: their pages become the tree's, unless it has such blocks."""
        path, chain = holding.path[:], holding.chain
        holding.path, holding.page_indices = path, holding.page_indices[:]
        for block in range(len(path), num_blocks):
            key = chain.key(block)
            node = self._tree.get(key)
            page = holding.own_pages.popleft() if self.plan.has_pages else None
            if node is None:
                node = self._tree.grow(path[-1] if path else None, key, page)
                if not path:
                    self._tree.name_first_block(node, chain.unsalted())
            else:
                self._tree.follow(node)
                self._share(holding, block, node, page)
            path.append(node)
            if not self.plan.has_states and (block + 1) % _ANCHOR_BLOCKS == 0:
                self._anchor(holding, node, None)
        holding.next_block_tokens = (len(path) + 1) * self.plan.page_tokens

    def _share(self, holding: Holding, block: int, node: Node, own: int | None) -> None:
        """Give back the page of a block that another request published first, and read its page."""
        if own is not None and node.page is not None:
            holding.page_indices[block] = index_of(node.page)
            self._arena.release(Tenant.PAGE, (own,))

    def _keep_snapshot(self, holding: Holding, at: int) -> None:
        """Hand a written snapshot to the tree, which may have got one from another request."""
        snapshot = holding.pending.pop(at)
        node = holding.path[at // self.plan.page_tokens - 1]
        if node.anchor is not None:
            self._arena.release(Tenant.SNAPSHOT, (snapshot,))
            return
        self._counters.num_snapshots += 1
        self._anchor(holding, node, snapshot)
        if at > holding.num_prompt_tokens:
            holding.rolling = node.anchor

    def _anchor(self, holding: Holding, node: Node, snapshot: int | None) -> None:
        if node.anchor is None:
            holding.anchors.append(self._tree.anchor(node, snapshot))

    def _count(self, holding: Holding) -> None:
        """Count a lookup, once what it found is used."""
        holding.counted = True
        found, counters = holding.lookup, self._counters
        counters.query_tokens += holding.num_prompt_tokens
        counters.hit_tokens += found.hit_tokens
        counters.missed_tokens += found.seen_tokens - found.hit_tokens
        if found.reason is None:
            counters.num_hits += 1
        else:
            name = found.reason.value
            counters.misses[name] = counters.misses.get(name, 0) + 1
