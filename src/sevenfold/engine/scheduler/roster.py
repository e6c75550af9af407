"""Who waits, who is being prefilled, who decodes: each list in the order of rank."""

from collections.abc import Iterator
from dataclasses import dataclass

from sevenfold.engine.request import FinishReason, Request, Status
from sevenfold.engine.scheduler.ranked import Rank, Ranked


@dataclass(eq=False, slots=True)
class Entry:
    """A request under way and what the scheduler notes of it.

    rank: (arrival_s - priority * ageing_s, serial number), lowest first. Waiting raises all
        requests alike, so that ageing never changes who comes before whom.
    due: (deadline_s, serial number), or None.
    reserved_tokens: tokens for which it has pages.
    lost_tokens: tokens that its last preemption threw away.
    barred_until: releases that must have happened before a preempted request is opened again.
    """

    request: Request
    rank: Rank
    due: Rank | None
    reserved_tokens: int = 0
    lost_tokens: int = 0
    barred_until: int = 0

    @property
    def num_uncomputed_tokens(self) -> int:
        """How many known tokens are to be computed."""
        return self.request.num_tokens - self.request.num_computed_tokens


class Roster:
    """Every request under way, in exactly one list."""

    def __init__(self, ageing_s: float) -> None:
        self.waiting: Ranked[Entry] = Ranked()
        self.prefilling: Ranked[Entry] = Ranked()
        self.decoding: Ranked[Entry] = Ranked()
        self._lists = {
            Status.WAITING: self.waiting,
            Status.PREFILLING: self.prefilling,
            Status.DECODING: self.decoding,
        }
        self._entries: dict[str, Entry] = {}
        self._deadlines: Ranked[Entry] = Ranked()
        self._ageing_s = ageing_s
        self._num_added = 0

    def add(self, request: Request, now_s: float) -> None:
        """Let a request wait."""
        serial = self._num_added
        rank = (now_s - request.priority * self._ageing_s, serial)
        due = None if request.deadline_s is None else (request.deadline_s, serial)
        entry = Entry(request, rank, due)
        self._num_added += 1
        self._entries[request.id] = entry
        self.waiting.add(rank, entry)
        if due is not None:
            self._deadlines.add(due, entry)

    def get(self, request_id: str) -> Entry | None:
        """Return a request that is under way, or None."""
        return self._entries.get(request_id)

    def move(self, entry: Entry, status: Status) -> None:
        """Put a request into another list."""
        self._lists[entry.request.status].remove(entry.rank)
        self._lists[status].add(entry.rank, entry)
        entry.request.status = status

    def remove(self, entry: Entry, reason: FinishReason) -> None:
        """Forget a request, which has ended."""
        request = entry.request
        self._lists[request.status].remove(entry.rank)
        del self._entries[request.id]
        if entry.due is not None:
            self._deadlines.remove(entry.due)
        request.status, request.finish_reason = Status.ENDED, reason

    def overdue(self, now_s: float) -> Entry | None:
        """Return a request whose deadline has come, or None."""
        if not self._deadlines or self._deadlines.first_rank[0] > now_s:
            return None
        return self._deadlines.first

    @property
    def num_open(self) -> int:
        """How many requests hold memory."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def open(self) -> tuple[Ranked[Entry], ...]:
        """The lists of those that hold memory."""
        return (self.prefilling, self.decoding)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())


def last_in_rank(lists: tuple[Ranked[Entry], ...]) -> Entry | None:
    """Return the request of several lists that ranks behind all others, or None."""
    last = [entries.last for entries in lists if entries]
    return max(last, key=lambda entry: entry.rank, default=None)
