"""The scheduler: continuous batching of prefill chunks and decode rows under a token budget."""

import time
from collections.abc import Callable, Iterable, Sequence

from sevenfold.engine.request import FinishReason, Request, Status
from sevenfold.engine.scheduler.admission import Admission
from sevenfold.engine.scheduler.cache import Cache
from sevenfold.engine.scheduler.config import QueueFullError, SchedulerConfig
from sevenfold.engine.scheduler.planning import Planner
from sevenfold.engine.scheduler.roster import Entry, Roster
from sevenfold.engine.scheduler.step import DecodeRow, PrefillChunk, Step
from sevenfold.engine.scheduler.tenancy import Tenancy
from sevenfold.engine.scheduler.waiting import WaitReason


class Scheduler:
    """Decides, step by step, which requests compute which tokens.

        step -> run the model -> record every row of the step -> step -> ...

    Every decode row advances in each step, and so does every open prompt. One order rules
    opening, budget and preemption: priority with ageing, then arrival. It is not thread-safe.
    """

    def __init__(
        self,
        cache: Cache,
        config: SchedulerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing to do.

        Args:
            cache: the memory that requests are opened in; the scheduler alone opens and closes.
            config: the limits.
            clock: seconds, never falling; deadlines are read on it.
        """
        self._config, self._clock = config, clock
        self._roster = Roster(config.ageing_s)
        self._tenancy = Tenancy(cache, config, self._roster)
        self._admission = Admission(config, self._roster, self._tenancy)
        self._planner = Planner(cache, config, self._roster, self._tenancy)
        self._cancelled: dict[str, None] = {}
        self._unrecorded: dict[str, PrefillChunk | DecodeRow] = {}
        self._ended: list[Request] = []

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Args:
            request: a new one.

        Raises:
            QueueFullError: max_waiting requests wait already.
            ValueError: the request can never fit into memory, its id is in use, or it is not new.
        """
        if request.status is not Status.WAITING or self._roster.get(request.id):
            raise ValueError(
                f"request must be new, with an id of its own, got {request.id!r} again"
            )
        self._check_fit(request)
        if len(self._roster.waiting) >= self._config.max_waiting:
            raise QueueFullError(
                f"waiting requests must be at most max_waiting = {self._config.max_waiting}, got "
                "one more; try again later"
            )
        self._roster.add(request, self._clock())

    def cancel(self, request_id: str) -> bool:
        """End a request at the beginning of the next step, which frees and reuses its memory.

        Returns:
            Whether a request of that id was under way.
        """
        if self._roster.get(request_id) is None:
            return False
        self._cancelled[request_id] = None
        return True

    def step(self) -> Step:
        """Decide what to compute next.

        Returns:
            The work. It may be empty, when the last request was preempted or nothing is under way.

        Raises:
            RuntimeError: a row of the step before was not recorded.
        """
        if self._unrecorded:
            missing = next(iter(self._unrecorded))
            raise RuntimeError(
                f"every row must be recorded before the next step, got no {missing!r}"
            )
        self._tenancy.let_go()
        if not len(self._roster):  # the requests of the step before have ended
            self._admission.stopped_by = WaitReason.TURN
            return Step((), (), (), self._take_ended())
        self._reap()
        self._tenancy.grow()
        # What memory cannot hold already is not helped by more.
        if self._tenancy.preempted:
            self._admission.stopped_by = WaitReason.MEMORY
        else:
            self._admit()
        prefills, decodes = self._planner.run()
        self._unrecorded = {row.request.id: row for row in (*prefills, *decodes)}
        preempted, self._tenancy.preempted = tuple(self._tenancy.preempted), []
        return Step(prefills, decodes, preempted, self._take_ended())

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Take the pages of a request's tokens up to a number, before a step needs them.

        Nobody is preempted for them. What the request does not come to goes back when it ends.

        Args:
            request: open.
            num_tokens: in all; at most what it may come to.

        Returns:
            False when memory is out, and then none is taken.

        Raises:
            ValueError: the request holds no memory.
        """
        entry = self._roster.get(request.id)
        if entry is None or entry.request is not request or request.status is Status.WAITING:
            raise ValueError(f"request must be open, got {request.id!r}, which is not")
        return self._tenancy.reserve(entry, num_tokens)

    def in_order(self, requests: Iterable[Request]) -> list[Request]:
        """Return requests that are under way in the order of rank, as a step has them."""
        ranks = {request: self._entry(request).rank for request in requests}
        return sorted(ranks, key=ranks.__getitem__)

    def record(self, request: Request, new_tokens: Sequence[int], *, stopped: bool = False) -> None:
        """Note what a row of the step gave, and end the request if that was its last.

        What it holds then is let go of behind the token, which somebody waits for: by let_go.

        Args:
            request: of a row that is not recorded yet.
            new_tokens: none after a chunk that yields no token; one after a chunk that does;
                one, and one for each accepted draft token, after a decode row.
            stopped: whether the output ends here by its own doing.

        Raises:
            ValueError: the request has no such row, or the row cannot give that many tokens.
        """
        row = self._unrecorded.get(request.id)
        entry = self._roster.get(request.id)
        if row is None or entry is None or entry.request is not request:
            raise ValueError(f"request must have an unrecorded row, got {request.id!r}")
        if isinstance(row, DecodeRow):
            least, most, end = (
                1,
                1 + row.draft_tokens,
                request.num_computed_tokens + len(new_tokens),
            )
        else:
            least, most, end = row.yields_token, int(row.yields_token), row.end
        if not least <= len(new_tokens) <= most:
            raise ValueError(
                f"new_tokens must have {least:d} to {most} tokens for {request.id!r}, got "
                f"{len(new_tokens)}"
            )
        if stopped and not new_tokens:
            raise ValueError("stopped must be False without a new token, got True")
        del self._unrecorded[request.id]
        request.num_computed_tokens = end
        request.generated.extend(new_tokens)
        if stopped or request.num_remaining_tokens == 0:
            self._tenancy.leave(entry, "stop" if stopped else "length")
            self._note_ended(request)
        elif request.status is Status.PREFILLING and new_tokens:
            self._roster.move(entry, Status.DECODING)
            self._tenancy.retry()

    def let_go(self) -> bool:
        """Give back what requests hold that have come to their end, as the next step does first.

        Returns:
            Whether there were any.
        """
        return self._tenancy.let_go()

    def fail(self, request: Request, message: str) -> None:
        """End one request at once because of a fault of its own; its rows need no record.

        Args:
            request: under way.
            message: what went wrong, for its caller.

        Raises:
            ValueError: the request is not under way.
        """
        entry = self._entry(request)
        request.error = message
        self._end(entry, "error")

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to compute or to tell."""
        return bool(len(self._roster) or self._ended)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no memory."""
        return len(self._roster.waiting)

    @property
    def waits_for(self) -> WaitReason:
        """Why they wait, as of the last step."""
        return self._admission.stopped_by

    @property
    def num_prefilling(self) -> int:
        """Requests whose prompt is being computed."""
        return len(self._roster.prefilling)

    @property
    def num_decoding(self) -> int:
        """Requests that have all but their last token computed."""
        return len(self._roster.decoding)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far."""
        return self._tenancy.num_preemptions

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens so far that preemption threw away and no cached prefix gave back."""
        return self._tenancy.num_recomputed_tokens

    def _entry(self, request: Request) -> Entry:
        entry = self._roster.get(request.id)
        if entry is None or entry.request is not request:
            raise ValueError(f"request must be under way, got {request.id!r}")
        return entry

    def _check_fit(self, request: Request) -> None:
        limit, prompt = self._config.max_request_tokens, len(request.prompt)
        need = prompt + request.max_tokens - 1
        if limit is None or need <= limit:
            return
        room = limit - prompt + 1
        remedy = f"lower max_tokens to {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"prompt + max_tokens - 1 must be at most {limit} tokens, which memory holds for one "
            f"request, got {prompt} + {request.max_tokens} - 1 = {need}; {remedy}"
        )

    def _reap(self) -> None:
        """End what was cancelled or is too late, before anybody is given memory."""
        for request_id in list(self._cancelled):
            if entry := self._roster.get(request_id):
                self._end(entry, "cancelled")
        now_s = self._clock()
        while entry := self._roster.overdue(now_s):
            self._end(entry, "deadline")

    def _take_ended(self) -> tuple[Request, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended

    def _admit(self) -> None:
        while entry := self._admission.run():
            request = entry.request
            self.fail(
                request,
                f"memory must hold {request.num_tokens} tokens of one request when nothing else "
                "runs, got none left; the memory plan promised more",
            )

    def _end(self, entry: Entry, reason: FinishReason) -> None:
        self._tenancy.release(entry, reason)
        self._note_ended(entry.request)

    def _note_ended(self, request: Request) -> None:
        self._cancelled.pop(request.id, None)
        self._unrecorded.pop(request.id, None)
        self._ended.append(request)
