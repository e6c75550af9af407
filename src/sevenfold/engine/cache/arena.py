"""Who holds which part of the arena: bookkeeping of slabs and of the items in them, without bytes.

A slab belongs to one tenant from its first item to its last, and is free in between: so states,
pages and snapshots share one budget at run time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sevenfold.config import SevenfoldError
from sevenfold.engine.cache.buckets import FullestFirst
from sevenfold.engine.memory_layout import ArenaLayout, Tenant

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1


class StaleReferenceError(SevenfoldError, LookupError):
    """An item was used after it had been given back."""


def index_of(handle: int) -> int:
    """Return where an item lies: its row in the strided view of its tenant."""
    return handle & _INDEX_MASK


@dataclass(frozen=True)
class ArenaUsage:
    """How the arena is used; the tuples are indexed by Tenant.

    num_pinned_items: those that no eviction can free.
    """

    num_free_slabs: int
    num_slabs: tuple[int, ...]
    num_items: tuple[int, ...]
    num_pinned_items: tuple[int, ...]


class _Slab:
    """A slab in use: which places are free, and the serial number and pin of each other."""

    __slots__ = ("free", "num_pinned", "pinned", "serials", "tenant")

    def __init__(self, tenant: Tenant, places: int) -> None:
        self.tenant = tenant
        self.free = list(range(places - 1, -1, -1))
        self.serials = [0] * places
        self.pinned = [False] * places
        self.num_pinned = 0


class Arena:
    """Gives out items by handles.

    A handle is an item's index and, above it, the serial number of its allocation: a handle of an
    item that was given back is refused, whoever holds the place now. An item is pinned when it is
    taken; one that is not pinned counts as one that can be freed at will.
    """

    def __init__(self, layout: ArenaLayout) -> None:
        self.layout = layout
        self._slabs: list[_Slab | None] = [None] * layout.num_slabs
        self._free = list(range(layout.num_usable_slabs, 0, -1))
        self._partial = [FullestFirst(places) for places in layout.places]
        self._serial = 0
        self._num_slabs, self._num_items = [0, 0, 0], [0, 0, 0]
        self._pinned_slabs, self._pinned_items = [0, 0, 0], [0, 0, 0]

    def take(self, tenant: Tenant, count: int = 1) -> list[int] | None:
        """Take items, pinned; None when there are not as many free, and then none is taken."""
        places = self.layout.places[tenant]
        in_slabs = self._num_slabs[tenant] * places - self._num_items[tenant]
        if count > in_slabs + len(self._free) * places:
            return None
        handles: list[int] = []
        while len(handles) < count:
            self._fill(tenant, count - len(handles), handles)
        return handles

    def release(self, tenant: Tenant, handles: Iterable[int]) -> None:
        """Give items back.

        Raises:
            StaleReferenceError: one of them is not held; those before it are given back.
        """
        for slab, number, place in self._held(tenant, handles):
            if slab.pinned[place]:
                self._unpin(slab, place)
            slab.serials[place] = 0
            self._partial[tenant].remove(number, len(slab.free))
            slab.free.append(place)
            self._num_items[tenant] -= 1
            if len(slab.free) == self.layout.places[tenant]:
                self._slabs[number] = None
                self._num_slabs[tenant] -= 1
                self._free.append(number)
            else:
                self._partial[tenant].add(number, len(slab.free))

    def pin(self, tenant: Tenant, handles: Iterable[int]) -> None:
        """Note that items must stay; none may be pinned already."""
        # A long path has hundreds: what a call would do for each is counted once.
        num_slabs = num_items = 0
        for slab, _, place in self._held(tenant, handles):
            if slab.pinned[place]:
                raise AssertionError("an item is pinned once")
            slab.pinned[place] = True
            num_slabs += not slab.num_pinned
            slab.num_pinned += 1
            num_items += 1
        self._pinned_slabs[tenant] += num_slabs
        self._pinned_items[tenant] += num_items

    def unpin(self, tenant: Tenant, handles: Iterable[int]) -> None:
        """Note that items may go; all must be pinned."""
        for slab, _, place in self._held(tenant, handles):
            if not slab.pinned[place]:
                raise AssertionError("an item is unpinned once")
            self._unpin(slab, place)

    def check(self, tenant: Tenant, handle: int) -> int:
        """Return the index of an item that is held.

        Raises:
            StaleReferenceError: it is not.
        """
        self._find(tenant, handle)
        return index_of(handle)

    def neighbours(self, tenant: Tenant, handle: int) -> list[int]:
        """Return the other items of an item's slab."""
        slab, number, place = self._find(tenant, handle)
        first = number * self.layout.places[tenant]
        return [
            serial << _INDEX_BITS | first + other
            for other, serial in enumerate(slab.serials)
            if serial and other != place
        ]

    def suffices(self, needs: tuple[int, int, int], *, whole_slabs: int = 0) -> bool:
        """Whether the items could be taken (states first, pages, snapshots last), and whole slabs
        besides, once all that is not pinned were given back."""
        slabs = self.layout.num_usable_slabs - sum(self._pinned_slabs) - whole_slabs
        pinned = zip(self.layout.places, self._pinned_slabs, self._pinned_items, needs, strict=True)
        for places, num_slabs, num_items, needed in pinned:
            missing = needed - (num_slabs * places - num_items)
            if missing > 0 and places:
                slabs -= -(-missing // places)
        return slabs >= 0

    def usage(self) -> ArenaUsage:
        """Return how the arena is used now."""
        return ArenaUsage(
            num_free_slabs=len(self._free),
            num_slabs=tuple(self._num_slabs),
            num_items=tuple(self._num_items),
            num_pinned_items=tuple(self._pinned_items),
        )

    def _fill(self, tenant: Tenant, wanted: int, handles: list[int]) -> None:
        """Take as many items from one slab as it has, up to the number wanted."""
        places = self.layout.places[tenant]
        number = self._partial[tenant].first()
        if number is None:
            number = self._free.pop()
            self._slabs[number] = _Slab(tenant, places)
            self._num_slabs[tenant] += 1
        slab = self._slabs[number]
        if slab is None:
            raise AssertionError("a partly filled slab is in use")
        # A slab fresh from the free ones was not among the partly filled.
        if len(slab.free) < places:
            self._partial[tenant].remove(number, len(slab.free))
        count, first = min(wanted, len(slab.free)), number * places
        taken = slab.free[: -count - 1 : -1]
        del slab.free[-count:]
        serials = range(self._serial + 1, self._serial + 1 + count)
        self._serial += count
        for serial, place in zip(serials, taken, strict=True):
            slab.serials[place], slab.pinned[place] = serial, True
            handles.append(serial << _INDEX_BITS | first + place)
        self._count_pins(slab, count)
        self._partial[tenant].add(number, len(slab.free))
        self._num_items[tenant] += count

    def _find(self, tenant: Tenant, handle: int) -> tuple[_Slab, int, int]:
        return next(self._held(tenant, (handle,)))

    def _held(self, tenant: Tenant, handles: Iterable[int]) -> Iterator[tuple[_Slab, int, int]]:
        """Each item's slab, the slab's number, and its place there, one after another."""
        places, slabs, end = self.layout.places[tenant] or 1, self._slabs, len(self._slabs)
        for handle in handles:
            index = handle & _INDEX_MASK
            number, place = index // places, index % places
            slab, serial = slabs[number] if number < end else None, handle >> _INDEX_BITS
            if slab is None or slab.tenant is not tenant or slab.serials[place] != serial:
                raise StaleReferenceError(
                    f"{tenant.name.lower()} must be held to be used, got place "
                    f"{index_of(handle)} of allocation {serial}, which was given back"
                )
            yield slab, number, place

    def _count_pins(self, slab: _Slab, count: int) -> None:
        self._pinned_slabs[slab.tenant] += slab.num_pinned == 0
        self._pinned_items[slab.tenant] += count
        slab.num_pinned += count

    def _unpin(self, slab: _Slab, place: int) -> None:
        slab.num_pinned -= 1
        slab.pinned[place] = False
        self._pinned_slabs[slab.tenant] -= slab.num_pinned == 0
        self._pinned_items[slab.tenant] -= 1
