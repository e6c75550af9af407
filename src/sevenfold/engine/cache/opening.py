"""Opening requests: memory for one, behind the longest prefix that it can go on from."""

from array import array

from sevenfold.engine.cache.arena import Arena, index_of
from sevenfold.engine.cache.holding import Fresh, Holding
from sevenfold.engine.cache.host import HostEntry, HostTier
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.cache.lookup import Lookup, Match, PrefixIndex, SeenKeys
from sevenfold.engine.cache.trails import Path, Trails
from sevenfold.engine.cache.tree import PrefixTree
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request


class Opening:
    """The memory, the prefixes in it, and what open requests hold.

    Args:
        plan: the budget and how it is cut.
        headroom_tokens, grain_tokens: as CacheManager's.
    """

    def __init__(
        self, plan: MemoryPlan, *, headroom_tokens: int = 256, grain_tokens: int | None = None
    ) -> None:
        self.plan = plan
        self._grain_tokens = grain_tokens
        self._headroom_tokens = headroom_tokens
        self._arena = Arena(plan.layout)
        seen = SeenKeys()
        self._host = None if plan.host is None else HostTier(plan.host)
        evicted = None if self._host is None else self._host.keep
        self._tree = PrefixTree(self._arena, plan, seen.add, evicted)
        self._trails = Trails(self._tree)
        self._index = PrefixIndex(
            self._tree,
            self._trails,
            seen,
            plan.page_tokens,
            any_node=not plan.has_states,
            grain_tokens=grain_tokens or plan.page_tokens,
        )
        self._holdings: dict[str, Holding] = {}
        self._fresh = Fresh([], [])

    def _admit(self, request: Request, chain: KeyChain, found: Match) -> Holding | None:
        """Take memory for a request behind the path that it goes on from."""
        num_pages = self._num_opening_pages(request)
        if self._lock(found.path, num_pages):
            return self._hold(request, chain, found, num_pages)
        if self._holdings or not found.path.nodes:
            return None
        # Alone: nothing will come free, and what was found is in the way of what is needed.
        found = found.without_path()
        is_locked = self._lock(found.path, num_pages)
        return self._hold(request, chain, found, num_pages) if is_locked else None

    def _admit_from_host(self, request: Request, chain: KeyChain, found: Match) -> Holding | None:
        """Take memory for a request that goes on from a longer prefix in the host's memory.

        The prefix takes its place in the tree at once; its items are filled before the model runs.
        """
        if self._host is None:
            return None
        page = self.plan.page_tokens
        most, least = (num_matched_tokens(request) - 1) // page, found.lookup.hit_tokens // page + 1
        entry = self._host.find(chain, most, least)
        if entry is None:
            return None
        path = Path.empty().to(self._tree.along(entry.keys))
        self._tree.lock(path.nodes)
        num_pages = self._num_opening_pages(request)
        needs = (int(self.plan.has_states), num_pages - len(path.nodes), 0)
        # The snapshot may come to lie in a slab of its own: in the one that others must keep its
        # place may be held by what need not stay.
        whole = int(entry.snapshot is not None)
        if not self._suffices(needs, whole_slabs=whole):
            self._tree.unlock(path.nodes)
            return None
        self._host.pin(entry)
        # A whole slab first, then part of one: pages find room wherever others leave it.
        state = self._take(Tenant.STATE, 1)[0] if self.plan.has_states else None
        path = self._bring_back(entry, path, chain)
        self._host.unpin(entry)
        hit = len(path.nodes) * page
        self._host.counters.hit_tokens += hit - found.lookup.hit_tokens
        seen = max(hit, found.lookup.seen_tokens)
        return self._hold(request, chain, Match(Lookup(hit, seen, None), path), num_pages, state)

    def _bring_back(self, entry: HostEntry, path: Path, chain: KeyChain) -> Path:
        """Put an entry's missing nodes behind a locked path, and a pinned anchor on the last.

        Returns:
            The path to there.
        """
        missing = entry.keys[len(path.nodes) :]
        snapshot = None if entry.snapshot is None else self._take(Tenant.SNAPSHOT, 1)[0]
        pages = self._take(Tenant.PAGE, len(missing)) if self.plan.has_pages and missing else []
        above, brought = path.nodes[-1] if path.nodes else None, []
        for n, key in enumerate(missing):
            node = self._tree.grow(above, key, pages[n] if pages else None)
            if above is None:
                self._tree.name_first_block(node, chain.unsalted())
            brought.append(node)
            above = node
        path = path.to(brought)
        if self._host is not None:
            self._host.read(entry, dict(zip(missing, pages, strict=False)), snapshot)
        self._tree.pin(self._tree.anchor(path.nodes[-1], snapshot))
        return path

    def _lock(self, path: Path, num_pages: int) -> bool:
        """Keep a path and its last state if what a request needs besides can be had."""
        nodes = path.nodes
        self._tree.lock(nodes)
        anchor = nodes[-1].anchor if nodes else None
        if anchor is not None:
            self._tree.pin(anchor)
        if self._suffices((int(self.plan.has_states), num_pages - len(nodes), 0)):
            return True
        if anchor is not None:
            self._tree.unpin(anchor)
        self._tree.unlock(nodes)
        return False

    def _suffices(self, needs: tuple[int, int, int], *, whole_slabs: int = 0) -> bool:
        """As Arena.suffices, with what requests have let go of: only unpinned where it matters."""
        if self._arena.suffices(needs, whole_slabs=whole_slabs):
            return True
        return self._tree.relax() and self._arena.suffices(needs, whole_slabs=whole_slabs)

    def _num_opening_pages(self, request: Request) -> int:
        """Pages for all known tokens and for some output: none of them can be refused later, while
        the state that the request goes on from must stay."""
        headroom = self._headroom_tokens << min(request.num_preemptions, 32)
        output = min(headroom, request.num_remaining_tokens - 1)
        return self.plan.num_pages(request.num_tokens + output)

    def _hold(
        self,
        request: Request,
        chain: KeyChain,
        found: Match,
        num_pages: int,
        state: int | None = None,
    ) -> Holding:
        """What a request holds behind a locked path, with a state that it has or gets now."""
        nodes, indices = found.path
        anchor = nodes[-1].anchor if nodes else None
        if anchor is not None:
            self._tree.hit(anchor)
        if state is None and self.plan.has_states:
            state = self._take(Tenant.STATE, 1)[0]
        holding = Holding(
            request=request,
            chain=chain,
            lookup=found.lookup,
            num_prompt_tokens=request.num_tokens,
            path=nodes,
            page_indices=indices,
            state=state,
            restored=anchor,
            next_block_tokens=(len(nodes) + 1) * self.plan.page_tokens,
        )
        if state is not None and anchor is None:
            self._fresh.states.append(index_of(state))
        missing = num_pages - len(indices)
        if missing > 0:
            self._give_pages(holding, self._take(Tenant.PAGE, missing))
        return holding

    def _give_pages(self, holding: Holding, pages: list[int]) -> None:
        indices = [index_of(page) for page in pages]
        holding.own_pages.extend(pages)
        holding.page_indices = holding.page_indices + array("q", indices)
        self._fresh.pages.extend(indices)

    def _take(self, tenant: Tenant, count: int) -> list[int]:
        while (handles := self._arena.take(tenant, count)) is None:
            if not self._tree.evict(whole_slab=tenant is Tenant.STATE):
                raise AssertionError("what is not pinned can be evicted")
        return handles


def num_matched_tokens(request: Request) -> int:
    """Tokens of a request that are looked for in the cache, one more than it may take from it."""
    most = request.max_cached_tokens
    return request.num_tokens if most is None else min(request.num_tokens, most + 1)
