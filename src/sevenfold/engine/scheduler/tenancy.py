"""Requests move in and out of memory: opening, growing, preemption, release."""

from sevenfold.engine.request import FinishReason, Request, Status
from sevenfold.engine.scheduler.cache import Cache
from sevenfold.engine.scheduler.config import SchedulerConfig
from sevenfold.engine.scheduler.roster import Entry, Roster, last_in_rank


class Tenancy:
    """Who holds memory, and who must give it up."""

    def __init__(self, cache: Cache, config: SchedulerConfig, roster: Roster) -> None:
        self._cache, self._config, self._roster = cache, config, roster
        self._refused: Entry | None = None
        self._leaving: list[Entry] = []
        self._num_releases = 0
        self.preempted: list[Request] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0

    def is_hopeless_now(self, entry: Entry) -> bool:
        """Whether nothing has changed since memory did not suffice for a request.

        Spares matching its prefix anew in each step. A preempted request stays out until another
        one has ended, or it would push its way in and be pushed out in turn.
        """
        barred = entry.barred_until > self._num_releases and self._roster.num_open > 0
        return barred or entry is self._refused

    def open(self, entry: Entry) -> bool:
        """Give a waiting request a state, its cached prefix and all pages that its prompt needs."""
        request = entry.request
        computed = self._cache.open(request)
        if computed is None:
            self._refused = entry
            return False
        # The last token that is generated is never computed, and has no place in memory.
        headroom = self._config.opening_headroom_tokens << min(request.num_preemptions, 32)
        need = request.num_tokens + min(headroom, request.num_remaining_tokens - 1)
        if not self.reserve(entry, need):
            self._free(entry, keep=False)
            self._refused = entry
            return False
        request.num_computed_tokens = computed
        if request.num_preemptions == 0:
            request.num_cached_tokens = computed
        self.num_recomputed_tokens += max(0, entry.lost_tokens - computed)
        self._roster.move(entry, Status.PREFILLING)
        return True

    def reserve(self, entry: Entry, num_tokens: int) -> bool:
        """Take pages for that many tokens in all, if memory has them."""
        if num_tokens <= entry.reserved_tokens:
            return True
        # Whole pages: the cache is asked once a page, not once a token.
        page = self._config.page_tokens
        whole = -(-num_tokens // page) * page
        if not self._cache.extend(entry.request, whole):
            return False
        entry.reserved_tokens = whole
        return True

    def grow(self) -> None:
        """Take the pages of all rows' next tokens, preempting the last in rank if need be."""
        for entry in list(self._roster.decoding):
            short = entry.request.num_computed_tokens >= entry.reserved_tokens
            if short and entry.request.status is Status.DECODING:
                self._grow(entry)

    def preempt(self, entry: Entry, *, keep: bool) -> None:
        """Take a request's memory and let it wait for its turn to be computed anew."""
        request = entry.request
        self._free(entry, keep=keep)
        entry.lost_tokens = request.num_computed_tokens
        entry.barred_until = self._num_releases + 1
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._roster.move(entry, Status.WAITING)
        self.preempted.append(request)
        self.num_preemptions += 1

    def release(self, entry: Entry, reason: FinishReason) -> None:
        """End a request; the prefix cache keeps its work, unless that may be faulty."""
        if entry.request.status is not Status.WAITING:
            self._free(entry, keep=reason != "error")
            self._num_releases += 1
        self._roster.remove(entry, reason)

    def leave(self, entry: Entry, reason: FinishReason) -> None:
        """End an open request whose work is kept, and let go of its memory later."""
        self._leaving.append(entry)
        self._roster.remove(entry, reason)

    def let_go(self) -> bool:
        """Take the memory of those that have left; returns whether any had."""
        any_left = bool(self._leaving)
        while self._leaving:
            self._free(self._leaving.pop(0), keep=True)
            self._num_releases += 1
        return any_left

    def retry(self) -> None:
        """Note that a prompt is computed, so that a waiting request may find more of its own."""
        self._refused = None

    def _grow(self, entry: Entry) -> None:
        while not self.reserve(entry, entry.request.num_computed_tokens + 1):
            victim = last_in_rank(self._roster.open) or entry
            # Alone, it leaves nothing behind: what it comes back to is all memory there is.
            self.preempt(victim, keep=self._roster.num_open > 1)
            if victim is entry:
                return

    def _free(self, entry: Entry, *, keep: bool) -> None:
        self._cache.close(entry.request, keep=keep)
        entry.reserved_tokens = 0
        self._refused = None
