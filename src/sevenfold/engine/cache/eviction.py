"""Which cached prefix goes first: by recency and by the FLOPs that a byte of it saves.

GreedyDual-Size: an entry's priority is L + FLOPs saved / bytes freed, where L is the priority of
the entry evicted last, read when the entry was used last. So what is not used ages as L rises, and
what saves more lives longer. Source: Cao and Irani, USENIX Symposium on Internet Technologies and
Systems 1997; the value is Marconi's, arXiv 2411.19379.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar


class Evictable(Protocol):
    """What the queue writes into its entries.

    floor: L when the entry was used last. ticket: the number of its place in the queue; 0 is none.
    """

    floor: float
    ticket: int


Entry = TypeVar("Entry", bound=Evictable)

_SLACK = 64


class EvictionQueue(Generic[Entry]):
    """A heap of entries; whatever changes an entry's place leaves the old one there, to be skipped.

    A value that has risen since an entry came in is seen when its turn comes; one that has fallen,
    when the entry is added again.
    """

    def __init__(self, value: Callable[[Entry], float]) -> None:
        self.floor = 0.0
        self._value = value
        self._heap: list[tuple[float, int, Entry]] = []
        self._num_tickets = 0
        self._num_entries = 0

    def __len__(self) -> int:
        return self._num_entries

    def touch(self, entry: Entry) -> None:
        """Add an entry as one used now, whether or not it is there."""
        entry.floor = self.floor
        self.add(entry)

    def add(self, entry: Entry) -> None:
        """Add an entry as one used when it was touched last, whether or not it is there."""
        self.remove(entry)
        self._num_entries += 1
        self._push(entry, entry.floor + self._value(entry))
        if len(self._heap) > 2 * self._num_entries + _SLACK:
            self._heap = [place for place in self._heap if place[2].ticket == place[1]]
            heapify(self._heap)

    def remove(self, entry: Entry) -> None:
        """Take an entry out if it is there."""
        if entry.ticket:
            entry.ticket = 0
            self._num_entries -= 1

    def first(self) -> Entry | None:
        """Return the entry that goes first, or None."""
        while self._heap:
            priority, ticket, entry = self._heap[0]
            if entry.ticket == ticket:
                now = entry.floor + self._value(entry)
                if now <= priority:
                    return entry
                self._push(entry, now)
            heappop(self._heap)
        return None

    def pop(self) -> Entry | None:
        """Take out the entry that goes first, and let the others age."""
        entry = self.first()
        if entry is not None:
            self.floor = max(self.floor, heappop(self._heap)[0])
            self.remove(entry)
        return entry

    def outranks_first(self, value: float) -> bool:
        """Whether an entry of that value, used now, would not be the first to go."""
        entry = self.first()
        return entry is not None and self._heap[0][0] < self.floor + value

    def _push(self, entry: Entry, priority: float) -> None:
        self._num_tickets += 1
        entry.ticket = self._num_tickets
        heappush(self._heap, (priority, entry.ticket, entry))
