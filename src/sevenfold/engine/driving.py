"""Steps of an engine, taken by whoever waits for a token."""

import threading
from collections import deque

from sevenfold.engine.constraint import Constraint
from sevenfold.engine.engine import Engine
from sevenfold.engine.events import TokenEvent
from sevenfold.engine.request import Request
from sevenfold.engine.sampling import SamplingParams
from sevenfold.engine.scheduler import QueueFullError
from sevenfold.engine.speculation import SpeculationCounters


class Driver:
    """Hands each request its events, whichever caller's wait computed them.

    It has no thread of its own: nothing runs while nobody waits. Callers may be in many threads.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._inboxes: dict[str, deque[TokenEvent]] = {}

    def submit(
        self, request: Request, params: SamplingParams, constraint: Constraint | None
    ) -> None:
        """Hand a request to the engine, as Engine.submit; while too many wait, take steps."""
        with self._lock:
            while True:
                try:
                    self._engine.submit(request, params, constraint)
                except QueueFullError:
                    self._step()
                else:
                    self._inboxes[request.id] = deque()
                    return

    def ready(self, request_id: str) -> TokenEvent | None:
        """Return a request's next event if it has come."""
        inbox = self._inboxes[request_id]
        return inbox.popleft() if inbox else None

    def next(self, request_id: str) -> TokenEvent:
        """Return a request's next event, and take steps until there is one."""
        while (event := self.ready(request_id)) is None:
            with self._lock:
                if not self._inboxes[request_id]:
                    self._step()
        return event

    def leave(self, request_id: str) -> None:
        """Forget a request and let go of what it holds; if it has not ended, in the next step."""
        with self._lock:
            self._inboxes.pop(request_id, None)
            self._engine.cancel(request_id)
            self._engine.let_go()

    def speculation_counters(self) -> SpeculationCounters | None:
        """Return the engine's, between two of its steps."""
        with self._lock:
            return self._engine.speculation_counters()

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except BaseException:
            # An interrupt, or memory that is out: the engine can go on, these requests cannot.
            self._engine.abandon("a step was interrupted")
            raise
        for event in events:
            if event.request_id in self._inboxes:
                self._inboxes[event.request_id].append(event)
