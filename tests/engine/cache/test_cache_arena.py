"""The arena against a set of byte ranges."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache import Arena, StaleReferenceError
from sevenfold.engine.cache.arena import index_of
from sevenfold.engine.memory_layout import ArenaLayout, Tenant

SLAB = 960  # divisible by every number of places below
LAYOUTS = st.builds(
    lambda slabs, pages, snapshots: ArenaLayout(slabs, SLAB, (1, pages, snapshots)),
    st.integers(2, 9),
    st.integers(0, 6),
    st.integers(0, 4),
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "release", "pin", "unpin"]),
        st.sampled_from(list(Tenant)),
        st.integers(0, 12),
    ),
    max_size=60,
)


class Naive:
    """Items that are held, and which of them are pinned."""

    def __init__(self, layout: ArenaLayout) -> None:
        self.layout = layout
        self.pinned: dict[tuple[Tenant, int], bool] = {}

    def room(self, tenant: Tenant) -> int:
        """Places that are free for a tenant: those in its slabs, and whole slabs."""
        places = self.layout.places[tenant]
        used: dict[int, Tenant] = {}
        for owner, handle in self.pinned:
            used[index_of(handle) // self.layout.places[owner]] = owner
        mine = sum(owner is tenant for owner in used.values()) * places
        free = (self.layout.num_usable_slabs - len(used)) * places
        return mine + free - sum(owner is tenant for owner, _ in self.pinned)

    def without_unpinned(self) -> "Naive":
        after = Naive(self.layout)
        after.pinned = {key: True for key, pinned in self.pinned.items() if pinned}
        return after

    def check_bytes(self) -> None:
        """No item touches another, the sink, or the end of the arena."""
        ranges = []
        for tenant, handle in self.pinned:
            stride = self.layout.stride_bytes(tenant)
            ranges.append((index_of(handle) * stride, (index_of(handle) + 1) * stride))
        ranges.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(ranges))
        if ranges:
            assert ranges[0][0] >= SLAB
            assert ranges[-1][1] <= self.layout.num_slabs * SLAB


@settings(max_examples=200, deadline=None)
@given(layout=LAYOUTS, calls=CALLS)
def test_items_never_overlap_and_counts_are_exact(layout: ArenaLayout, calls) -> None:
    arena, naive = Arena(layout), Naive(layout)
    given_back: list[tuple[Tenant, int]] = []
    for call, tenant, number in calls:
        held = [key for key in naive.pinned if key[0] is tenant]
        if call == "take":
            room = naive.room(tenant)
            handles = arena.take(tenant, number)
            assert (handles is not None) == (number <= room)
            naive.pinned.update({(tenant, handle): True for handle in handles or []})
        elif held:
            key = held[number % len(held)]
            if call == "release":
                arena.release(tenant, [key[1]])
                del naive.pinned[key]
                given_back.append(key)
            elif naive.pinned[key] == (call == "unpin"):
                (arena.pin if call == "pin" else arena.unpin)(key[0], [key[1]])
                naive.pinned[key] = call == "pin"
        naive.check_bytes()
        usage = arena.usage()
        for each in Tenant:
            mine = [pinned for key, pinned in naive.pinned.items() if key[0] is each]
            assert usage.num_items[each] == len(mine)
            assert usage.num_pinned_items[each] == sum(mine)
        assert usage.num_free_slabs + sum(usage.num_slabs) == layout.num_usable_slabs
    for tenant, handle in given_back:
        with pytest.raises(StaleReferenceError, match="must be held to be used"):
            arena.check(tenant, handle)


@settings(max_examples=200, deadline=None)
@given(layout=LAYOUTS, calls=CALLS, state=st.booleans(), pages=st.integers(0, 20))
def test_suffices_says_what_taking_after_giving_back_does(layout, calls, state, pages) -> None:
    arena = Arena(layout)
    loose: list[tuple[Tenant, int]] = []
    for call, tenant, number in calls:
        handles = arena.take(tenant, number % 4) or []
        if call != "take":
            for handle in handles:
                arena.unpin(tenant, [handle])
                loose.append((tenant, handle))
    promised = arena.suffices((int(state), pages, 0))
    for tenant, handle in loose:
        arena.release(tenant, [handle])
    got_state = arena.take(Tenant.STATE, int(state)) is not None
    got = got_state and arena.take(Tenant.PAGE, pages) is not None
    assert promised == (got if layout.places[Tenant.PAGE] or not pages else got_state)


def test_the_fullest_slab_is_filled_first_so_that_others_come_free() -> None:
    arena = Arena(ArenaLayout(4, SLAB, (1, 4, 1)))
    pages = arena.take(Tenant.PAGE, 8)
    assert pages is not None
    by_slab = {index_of(page) // 4: [] for page in pages}
    for page in pages:
        by_slab[index_of(page) // 4].append(page)
    empty, full = by_slab
    arena.release(Tenant.PAGE, by_slab[empty][:3])
    arena.release(Tenant.PAGE, by_slab[full][:1])
    [page] = arena.take(Tenant.PAGE) or []
    assert index_of(page) // 4 == full
    arena.release(Tenant.PAGE, by_slab[empty][3:])
    assert arena.usage().num_free_slabs == 2


def test_a_place_given_to_another_makes_the_old_handle_stale() -> None:
    arena = Arena(ArenaLayout(2, SLAB, (1, 2, 0)))
    [state] = arena.take(Tenant.STATE) or []
    arena.release(Tenant.STATE, [state])
    [again] = arena.take(Tenant.STATE) or []
    assert index_of(again) == index_of(state)
    assert arena.check(Tenant.STATE, again) == index_of(state)
    for use in (
        lambda: arena.check(Tenant.STATE, state),
        lambda: arena.release(Tenant.STATE, [state]),
        lambda: arena.pin(Tenant.STATE, [state]),
        lambda: arena.check(Tenant.PAGE, again),
    ):
        with pytest.raises(StaleReferenceError, match="which was given back"):
            use()


def test_pins_are_not_counted() -> None:
    arena = Arena(ArenaLayout(2, SLAB, (1, 2, 0)))
    [state] = arena.take(Tenant.STATE) or []
    with pytest.raises(AssertionError, match="pinned once"):
        arena.pin(Tenant.STATE, [state])
    arena.unpin(Tenant.STATE, [state])
    with pytest.raises(AssertionError, match="unpinned once"):
        arena.unpin(Tenant.STATE, [state])


@pytest.mark.parametrize(
    ("num_slabs", "places", "message"),
    [
        (1, (1, 1, 1), "num_slabs must be 2 or more, got 1"),
        (2, (1, 7, 1), r"places must each be 0 or divide slab_bytes = 960, got \(1, 7, 1\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(num_slabs, places, message) -> None:
    with pytest.raises(ValueError, match=message):
        ArenaLayout(num_slabs, SLAB, places)
