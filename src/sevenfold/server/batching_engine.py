"""The continuous-batching engine behind the server's seam, in a thread of its own."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from sevenfold.engine import RequestFailedError, TextModel
from sevenfold.engine.cache import MissReason, SessionLimits
from sevenfold.engine.engine import Engine, TokenEvent
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request
from sevenfold.engine.scheduler import QueueFullError, SchedulerConfig
from sevenfold.engine.speculation import DraftModel, SpeculationConfig, SpeculationCounters
from sevenfold.server.engine_protocol import (
    EngineFullError,
    EngineStats,
    EngineStoppedError,
    Feature,
    GenerationRequest,
    Pool,
    PromptOutput,
    TokenOutput,
)
from sevenfold.server.engine_protocol import MissReason as PublicReason

_JOIN_S = 10.0  # a long prefill does not keep the program from ending
_REASONS: dict[MissReason, PublicReason] = {
    MissReason.TOO_SHORT: "too_short",
    MissReason.NO_KV: "cold",
    MissReason.NO_STATE: "no_state",
    MissReason.EVICTED: "cold",
    MissReason.NO_MEMORY: "cold",
}


@dataclass(eq=False)
class _Job:
    """A request on its way through the thread; give hands its outputs to the event loop."""

    request: GenerationRequest
    give: Callable[[TokenOutput | Exception], None]


class BatchingEngine:
    """Serves by sevenfold.engine.engine.Engine: many outputs at a time, and a prefix cache."""

    def __init__(
        self,
        source: TextModel,
        model_name: str,
        plan: MemoryPlan,
        config: SchedulerConfig,
        *,
        sessions: SessionLimits | None = None,
        speculation: SpeculationConfig | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        """Allocate the plan's memory and start.

        Args:
            source: the model and its tokenizer.
            model_name: what clients call it.
            plan: of the model's config.
            config: the scheduler's limits.
            sessions: how many conversations may keep their prefixes; None takes the defaults.
            speculation, draft: as Engine takes them.
        """
        sessions = sessions or SessionLimits()
        offered: set[Feature] = {"constraint", "prompt_logprobs", "priority"}
        if sessions.max_sessions:
            offered.add("session")
        self.features: frozenset[Feature] = frozenset(offered)
        self.model_name, self.tokenizer = model_name, source.tokenizer
        limits = (source.model.config.max_position_embeddings, config.max_request_tokens)
        self.max_context_tokens = min(n for n in limits if n is not None)
        self.vocab_size = source.model.config.vocab_size
        self.eos_token_id = source.model.config.eos_token_id
        self._plan = plan
        self._weight_bytes = sum(p.numel() * p.element_size() for p in source.model.parameters())
        self._engine = Engine(
            source.model,
            source.tokenizer,
            plan,
            config,
            sessions=sessions,
            speculation=speculation,
            draft=draft,
            ranks=source.ranks,
        )
        self._jobs: dict[str, _Job] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._stats = EngineStats()
        self._thread = threading.Thread(target=self._work, name="sevenfold-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Generate one output; closing the iterator cancels it at the engine's next step."""
        loop = asyncio.get_running_loop()
        given: asyncio.Queue[TokenOutput | Exception] = asyncio.Queue()

        def give(output: TokenOutput | Exception) -> None:
            loop.call_soon_threadsafe(given.put_nowait, output)

        job = _Job(request, give)
        self._order(lambda: self._start(job))
        try:
            while True:
                output = await given.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._order(lambda: self._cancel(job), refuse=False)

    def stats(self) -> EngineStats:
        """What the engine told of itself after its last step."""
        return self._stats

    def healthy(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the step under way; outputs that have not ended fail."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(_JOIN_S)

    def _order(self, run: Callable[[], None], *, refuse: bool = True) -> None:
        """Let the thread run something before its next step."""
        with self._wake:
            if self._closed or not self._thread.is_alive():
                if refuse:
                    raise EngineStoppedError("the engine has stopped")
                return
            self._orders.append(run)
            self._wake.notify()

    def _work(self) -> None:
        try:
            while self._next():
                events = self._engine.step()
                # First: whoever gets a token finds it in the stats.
                self._stats = self._read_stats()
                for event in events:
                    self._tell(event)
        finally:
            with self._wake:
                self._closed = True
            for job in list(self._jobs.values()):
                _give(job, EngineStoppedError("the engine has stopped"))

    def _next(self) -> bool:
        """Wait for work and carry out what was ordered; False to stop."""
        while True:
            with self._wake:
                while not (self._orders or self._closed or self._engine.has_work):
                    self._wake.wait()
                if self._closed:
                    self._refuse()
                    return False
                orders, self._orders = self._orders, deque()
            for order in orders:
                order()
            self._stats = self._read_stats()
            if self._engine.has_work:
                return True

    def _refuse(self) -> None:
        """Carry out what is left, so that nobody waits for an answer that never comes."""
        while self._orders:
            self._orders.popleft()()

    def _start(self, job: _Job) -> None:
        asked = job.request
        if self._closed:
            _give(job, EngineStoppedError("the engine has stopped"))
            return
        try:
            request = Request(
                id=asked.id,
                prompt=asked.prompt,
                max_tokens=asked.sampling.max_tokens,
                priority=asked.priority,
                deadline_s=None
                if asked.deadline_s is None
                else time.monotonic() + asked.deadline_s,
                marks=asked.marks,
                salt=asked.salt,
                session=asked.session,
            )
            self._engine.submit(request, asked.sampling, asked.constraint)
        except QueueFullError as error:
            _give(job, EngineFullError(str(error)))
        except ValueError as error:
            _give(job, RequestFailedError(str(error)))
        else:
            self._jobs[asked.id] = job

    def _cancel(self, job: _Job) -> None:
        if self._jobs.pop(job.request.id, None) is not None:
            self._engine.cancel(job.request.id)

    def _tell(self, event: TokenEvent) -> None:
        job = self._jobs.get(event.request_id)
        if event.finish_reason is not None:
            self._jobs.pop(event.request_id, None)
        if job is None:
            return
        if event.token_id is None:
            message = event.error or f"the output ended: {event.finish_reason}"
            _give(job, RequestFailedError(message))
            return
        reason = "stop" if event.finish_reason == "stop" else event.finish_reason and "length"
        found, prompt = event.prompt, None
        if found is not None:
            public = found.public_reason
            missed = None if public is None else _REASONS[public]
            prompt = PromptOutput(found.hit_tokens, missed, event.prompt_logprobs)
        _give(job, TokenOutput(event.token_id, event.text, reason, event.logprobs, prompt))

    def _read_stats(self) -> EngineStats:
        scheduler, counters = self._engine.scheduler, self._engine.counters()
        usage, plan = self._engine.cache.usage(), self._plan
        drafts = self._engine.speculation_counters() or SpeculationCounters()
        layout = plan.layout
        sizes = (plan.state_bytes, plan.page_bytes, plan.snapshot_bytes)
        states, pages, snapshots = (
            Pool(usage.num_items[t], layout.num_usable_slabs * layout.places[t], sizes[t])
            for t in Tenant
        )
        taken = layout.num_usable_slabs - usage.num_free_slabs
        held = {"states": states, "kv": pages, "snapshots": snapshots}
        memory = {name: pool.used * pool.bytes_each for name, pool in held.items()}
        return EngineStats(
            running=scheduler.num_prefilling + scheduler.num_decoding,
            waiting={"memory_or_turn": scheduler.num_waiting},
            slabs=Pool(taken, layout.num_usable_slabs, layout.slab_bytes),
            pages=pages,
            states=states,
            snapshots=snapshots,
            memory_bytes={"weights": self._weight_bytes} | memory,
            prompt_tokens=counters.query_tokens,
            cached_tokens=counters.hit_tokens,
            potential_tokens=counters.missed_tokens,
            recomputed_tokens=scheduler.num_recomputed_tokens,
            snapshots_evicted=counters.num_evicted,
            preemptions=scheduler.num_preemptions,
            drafted_tokens=drafts.num_drafted_tokens,
            accepted_tokens=drafts.num_accepted_tokens,
            effective_concurrency=plan.concurrency(self.max_context_tokens),
            sessions=self._engine.cache.num_sessions,
            smallest_cacheable_prefix_tokens=plan.smallest_cacheable_prefix_tokens,
        )


def _give(job: _Job, output: TokenOutput | Exception) -> None:
    try:
        job.give(output)
    except RuntimeError:
        # The event loop has closed: nobody waits any more.
        return
