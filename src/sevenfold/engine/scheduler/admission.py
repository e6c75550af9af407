"""Opening waiting requests."""

from sevenfold.engine.scheduler.config import SchedulerConfig
from sevenfold.engine.scheduler.ranked import Ranked
from sevenfold.engine.scheduler.roster import Entry, Roster, last_in_rank
from sevenfold.engine.scheduler.tenancy import Tenancy


class Admission:
    """Opens waiting requests in the order of rank, as far as budget, rows and memory go.

    Nobody overtakes the first, so that a request that needs much memory gets it in the end.
    """

    def __init__(self, config: SchedulerConfig, roster: Roster, tenancy: Tenancy) -> None:
        self._config, self._roster, self._tenancy = config, roster, tenancy
        self._owed_tokens = self._num_long = 0

    def run(self) -> Entry | None:
        """Open what can be opened now; return a request that does not fit into idle memory."""
        self._count()
        budget = self._config.max_step_tokens - len(self._roster.decoding)
        while self._roster.waiting:
            entry = self._roster.waiting.first
            if self._owed_tokens + self._config.min_chunk_tokens > budget:
                return None
            if self._tenancy.is_hopeless_now(entry):
                return None
            if not self._open(entry):
                return None if self._roster.num_open else entry
            self._add(entry)
        return None

    def _open(self, entry: Entry) -> bool:
        """Open a request, preempting open ones that rank behind it if need be.

        Those are of lower priority: among equals the first to come is opened first.
        """
        while True:
            rivals = self._rivals()
            if not rivals:
                if self._tenancy.open(entry):
                    return True
                rivals = self._roster.open
            if self._config.batch_invariant:
                return False
            victim = last_in_rank(rivals)
            if victim is None or victim.rank < entry.rank:
                return False
            self._tenancy.preempt(victim, keep=True)
            self._count()

    def _rivals(self) -> tuple[Ranked[Entry], ...]:
        """Return the requests of which one has to go before one more is opened."""
        if self._num_long >= self._config.max_prefills:
            return (self._roster.prefilling,)
        if self._roster.num_open >= self._config.max_running:
            return self._roster.open
        return ()

    def _count(self) -> None:
        self._owed_tokens = self._num_long = 0
        for entry in self._roster.prefilling:
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        uncomputed, least = entry.num_uncomputed_tokens, self._config.min_chunk_tokens
        self._owed_tokens += min(uncomputed, least)
        self._num_long += uncomputed > least
