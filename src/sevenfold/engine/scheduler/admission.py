"""Opening waiting requests."""

from sevenfold.engine.scheduler.config import SchedulerConfig
from sevenfold.engine.scheduler.ranked import Ranked
from sevenfold.engine.scheduler.roster import Entry, Roster, last_in_rank
from sevenfold.engine.scheduler.tenancy import Tenancy
from sevenfold.engine.scheduler.waiting import WaitReason


class Admission:
    """Opens waiting requests in the order of rank, as far as budget, rows and memory go.

    Nobody overtakes the first, so that a request that needs much memory gets it in the end.

    stopped_by: why the first that waits was not opened.
    """

    def __init__(self, config: SchedulerConfig, roster: Roster, tenancy: Tenancy) -> None:
        self._config, self._roster, self._tenancy = config, roster, tenancy
        self._owed_tokens = self._num_long = 0
        self.stopped_by = WaitReason.TURN

    def run(self) -> Entry | None:
        """Open what can be opened now; return a request that does not fit into idle memory."""
        self._count()
        self.stopped_by = WaitReason.TURN
        budget = self._config.max_step_tokens - len(self._roster.decoding)
        while self._roster.waiting:
            entry = self._roster.waiting.first
            if self._owed_tokens + self._config.min_chunk_tokens > budget:
                self.stopped_by = WaitReason.MAX_STEP_TOKENS
                return None
            if self._tenancy.is_hopeless_now(entry):
                self.stopped_by = WaitReason.MEMORY
                return None
            stopped_by = self._open(entry)
            if stopped_by is not None:
                self.stopped_by = stopped_by
                return None if self._roster.num_open else entry
            self._add(entry)
        return None

    def _open(self, entry: Entry) -> WaitReason | None:
        """Open a request, or say why it has to wait; preempts those that rank behind it if need be.

        Those are of lower priority: among equals the first to come is opened first.
        """
        while True:
            reason, rivals = self._full()
            if reason is None:
                if self._tenancy.open(entry):
                    return None
                reason, rivals = WaitReason.MEMORY, self._roster.open
            if self._config.batch_invariant:
                return reason
            victim = last_in_rank(rivals)
            if victim is None or victim.rank < entry.rank:
                return reason
            self._tenancy.preempt(victim, keep=True)
            self._count()

    def _full(self) -> tuple[WaitReason | None, tuple[Ranked[Entry], ...]]:
        """Return the limit that is reached, and those of whom one has to go for one more."""
        if self._num_long >= self._config.max_prefills:
            return WaitReason.MAX_PREFILLS, (self._roster.prefilling,)
        if self._roster.num_open >= self._config.max_running:
            return WaitReason.MAX_RUNNING, self._roster.open
        return None, ()

    def _count(self) -> None:
        self._owed_tokens = self._num_long = 0
        for entry in self._roster.prefilling:
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        uncomputed, least = entry.num_uncomputed_tokens, self._config.min_chunk_tokens
        self._owed_tokens += min(uncomputed, least)
        self._num_long += uncomputed > least
