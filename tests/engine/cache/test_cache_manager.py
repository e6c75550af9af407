"""The manager against a naive model, under any order of calls."""

from dataclasses import replace

from cache_helpers import FULL, HYBRID, LINEAR, P, Runner, tiny_plan
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sevenfold.engine.cache import CacheManager, trails
from sevenfold.engine.cache.arena import index_of
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request

# Paths that leave one another at few places, so that much is shared.
LETTERS = st.builds(
    lambda length, rest: "aaaaaa"[:length] + rest,
    st.integers(0, 6),
    st.sampled_from(["", "b", "bc", "bcd"]),
)
TAILS = st.integers(0, P - 1)


def path_of(node) -> list:
    return [node, *path_of(node.parent)] if node else []


class Sessions(RuleBasedStateMachine):
    """Requests come, compute, end and are preempted while memory is always short."""

    @initialize(
        num_slabs=st.integers(4, 16),
        layers=st.sampled_from([HYBRID, (LINEAR,), (FULL,), (LINEAR, FULL, FULL, FULL, FULL)]),
        dtype=st.sampled_from(["fp32", "fp16", "int8"]),
        head_dim=st.sampled_from([16, 64]),
        headroom=st.sampled_from([0, 0, 40]),
        host_slabs=st.sampled_from([0, 3, 5, 20]),
        limits=st.sampled_from([(1, 40), (1, 40), (1, 7), (trails._LEAST_BLOCKS, 40)]),
    )
    def begin(self, num_slabs, layers, dtype, head_dim, headroom, host_slabs, limits) -> None:
        self.limits = trails._LEAST_BLOCKS, trails._MOST_BLOCKS
        trails._LEAST_BLOCKS, trails._MOST_BLOCKS = limits
        plan = tiny_plan(num_slabs, layers, dtype, head_dim, host_slabs)
        self.headroom = headroom
        self.runner = Runner(CacheManager(plan, headroom_tokens=headroom))

    def longest_anchored(self, request: Request) -> int:
        """The naive lookup: every snapshot that is cached, against every token."""
        manager, best = self.runner.manager, 0
        for node in manager._tree._nodes.values():
            if manager.plan.has_states and node.anchor is None:
                continue
            tokens = request.tokens[: node.num_tokens]
            if node.num_tokens < request.num_tokens and self.holds(node, (request.salt, tokens)):
                best = max(best, node.num_tokens)
        return best

    def longest_on_host(self, request: Request) -> int:
        """The longest entry of the host's memory that is a prefix, by what its items hold."""
        tier, best = self.runner.manager._host, 0
        for entry in () if tier is None else tier._entries.values():
            end = len(entry.keys) * P
            content = (request.salt, request.tokens[:end])
            if end < request.num_tokens and self.holds_on_host(entry, content):
                best = max(best, end)
        return best

    def holds_on_host(self, entry, content) -> bool:
        tier = self.runner.manager._host
        tenant, handle = Tenant.SNAPSHOT, entry.snapshot
        if handle is None:
            tenant, handle = Tenant.PAGE, tier._blocks[entry.keys[-1]].page
        return self.runner.host.get((tenant, tier._arena.check(tenant, handle))) == content

    def holds(self, node, content) -> bool:
        if node.anchor is not None and node.anchor.snapshot is not None:
            index = self.runner.manager._arena.check(Tenant.SNAPSHOT, node.anchor.snapshot)
            return self.runner.memory.get((Tenant.SNAPSHOT, index)) == content
        index = self.runner.manager._arena.check(Tenant.PAGE, node.page)
        return self.runner.memory.get((Tenant.PAGE, index)) == content

    @rule(letters=LETTERS, tail=TAILS, salt=st.sampled_from([b"x", b"y"]), data=st.data())
    def submit(self, letters, tail, salt, data) -> None:
        prompt = tuple(t for letter in letters for t in [ord(letter)] * P) + (7,) * tail
        prompt = prompt or (7,)
        marks = data.draw(st.lists(st.integers(1, len(prompt)), unique=True, max_size=4))
        request = self.runner.request(prompt, marks=tuple(sorted(marks)), salt=salt, max_tokens=99)
        self.try_to_open(request)

    def try_to_open(self, request: Request) -> None:
        manager = self.runner.manager
        manager._settle_all()
        on_device, on_host = self.longest_anchored(request), self.longest_on_host(request)
        before = replace(manager.usage(), num_pinned_items=())
        fits = manager.plan.longest_context_tokens
        alone = not self.runner.open and (
            fits is None or request.num_tokens + self.headroom <= fits
        )
        hit = self.runner.start(request)
        if hit is None:
            assert not alone
            assert replace(manager.usage(), num_pinned_items=()) == before
            return
        reason = manager.lookup(request).reason
        assert (reason is None) == (hit > 0)
        # What lies on the host is longer only if the device has room for all of it.
        no_room = hit == 0 and reason is not None and reason.value == "no_memory"
        assert hit == max(on_device, on_host) or hit == on_device or no_room

    @rule(letters=LETTERS, tail=TAILS, salt=st.sampled_from([b"x", b"y"]), data=st.data())
    def chat(self, letters, tail, salt, data) -> None:
        """A request from beginning to end, while others are open."""
        self.submit(letters, tail, salt, data)
        request = list(self.runner.open.values())[-1] if self.runner.open else None
        if request is None or request.num_computed_tokens >= request.num_tokens:
            return
        if self.runner.compute(request, request.num_tokens):
            for _ in range(data.draw(st.integers(1, 70))):
                request.generated.append(97)
                if not self.runner.compute(request, request.num_tokens):
                    break
        self.runner.finish(request)

    @precondition(lambda self: self.runner.open)
    @rule(data=st.data(), tokens=st.integers(1, 60))
    def advance(self, data, tokens) -> None:
        request = data.draw(st.sampled_from(list(self.runner.open.values())))
        first = request.num_computed_tokens
        if request.num_tokens == first:
            request.generated.append(data.draw(st.sampled_from([97, 98])))
        end = min(first + tokens, request.num_tokens)
        before = self.runner.manager.usage()
        if not self.runner.compute(request, end):
            # Nothing was taken; and alone a request gets all that the plan promises.
            assert self.runner.manager.usage().num_items[Tenant.PAGE] == before.num_items[1]
            longest = self.runner.manager.plan.longest_context_tokens
            assert len(self.runner.open) > 1 or end > longest

    @precondition(lambda self: self.runner.open)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data, keep) -> None:
        request = data.draw(st.sampled_from(list(self.runner.open.values())))
        self.runner.finish(request, keep=keep)

    @precondition(lambda self: self.runner.open)
    @rule(data=st.data())
    def preempt(self, data) -> None:
        request = data.draw(st.sampled_from(list(self.runner.open.values())))
        self.runner.finish(request, keep=True)
        request.num_computed_tokens = 0
        self.try_to_open(request)

    @invariant()
    def memory_is_sound(self) -> None:
        if not hasattr(self, "runner"):
            return
        self.runner.check()
        tree, arena = self.runner.manager._tree, self.runner.manager._arena
        for node in tree._nodes.values():
            # What no snapshot reaches and no request uses is dropped.
            assert node.num_children or node.refs or node.anchor
            assert tree.holds(node)
            assert node.parent is None or tree.holds(node.parent)
            if node.page is not None:
                arena.check(Tenant.PAGE, node.page)
        owned = sum(len(h.own_pages) for h in self.runner.manager._holdings.values())
        cached = sum(node.page is not None for node in tree._nodes.values())
        assert self.runner.manager.usage().num_items[Tenant.PAGE] == owned + cached
        self.pins_are_sound(owned)
        pending = sum(len(h.pending) for h in self.runner.manager._holdings.values())
        anchors = [node.anchor for node in tree._nodes.values() if node.anchor]
        kept = sum(anchor.snapshot is not None for anchor in anchors)
        assert self.runner.manager.usage().num_items[Tenant.SNAPSHOT] == pending + kept
        self.host_is_sound()
        self.trails_are_sound()

    def trails_are_sound(self) -> None:
        """Each is listed in both places; what is left of it is a path of the tree, and its own."""
        held, tree = self.runner.manager._trails, self.runner.manager._tree
        listed = [trail for some in held._by_start.values() for trail in some.values()]
        assert sorted(map(id, listed)) == sorted(map(id, held._trails.values()))
        assert held._num_blocks == sum(map(len, listed)) <= trails._MOST_BLOCKS
        for trail in listed:
            nodes, indices = trail.path
            assert [node.key for node in nodes] == trail.keys
            pages = [node.page for node in nodes if node.page is not None]
            assert list(indices) == [index_of(page) for page in pages]
            alive = [tree.holds(node) for node in nodes]
            assert alive == sorted(alive, reverse=True)

    def pins_are_sound(self, owned: int) -> None:
        """What a request uses is pinned; what none uses may be, until that matters."""
        tree, arena = self.runner.manager._tree, self.runner.manager._arena
        nodes = set(tree._nodes.values())
        used = {n for end in nodes if end.refs for n in path_of(end)}
        pinned = {node for node in nodes if node.pinned}
        assert used <= pinned
        assert all(node.num_pinned == sum(p.parent is node for p in pinned) for node in nodes)
        assert all(node.parent is None or node.parent in pinned for node in pinned)
        # Each of the others has one below it that the next call of relax begins with.
        assert pinned == used | {n for end in tree._loose if end in pinned for n in path_of(end)}
        held = sum(node.page is not None for node in pinned)
        assert arena.usage().num_pinned_items[Tenant.PAGE] == owned + held
        opened = sum(h.path != [] for h in self.runner.manager._holdings.values())
        assert sum(node.refs for node in nodes) == opened

    @rule()
    def relax(self) -> None:
        """Pins are exact once they have to be, which it is not for an invariant to bring on."""
        tree = self.runner.manager._tree
        pinned = self.runner.manager.num_pinned_items()
        used = {n for end in tree._nodes.values() if end.refs for n in path_of(end)}
        owned = sum(len(h.own_pages) for h in self.runner.manager._holdings.values())
        assert pinned[Tenant.PAGE] == owned + sum(node.page is not None for node in used)
        assert used == {node for node in tree._nodes.values() if node.pinned}

    def host_is_sound(self) -> None:
        tier = self.runner.manager._host
        if tier is None:
            return
        entries, blocks, usage = tier._entries.values(), tier._blocks.values(), tier.usage()
        in_use = sum(usage.num_slabs) + usage.num_free_slabs
        assert in_use == self.runner.manager.plan.host.num_usable_slabs
        # Each item has an owner, and each owner its items.
        assert usage.num_items[Tenant.PAGE] == sum(b.page is not None for b in blocks)
        assert usage.num_items[Tenant.SNAPSHOT] == sum(e.snapshot is not None for e in entries)
        assert {key for entry in entries for key in entry.keys} == set(tier._blocks)
        assert all(not entry.pins for entry in entries)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            trails._LEAST_BLOCKS, trails._MOST_BLOCKS = self.limits
            self.runner.check_nothing_is_left()
            assert len(self.runner.manager._tree) == 0


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=50,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
