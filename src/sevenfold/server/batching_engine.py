"""The continuous-batching engine behind the server's seam, in a thread of its own."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from sevenfold.engine import RequestFailedError, SamplingParams, TextModel
from sevenfold.engine.cache import MissReason, SessionLimits
from sevenfold.engine.engine import Engine
from sevenfold.engine.events import TokenEvent
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.request import Request, Status
from sevenfold.engine.scheduler import QueueFullError, SchedulerConfig
from sevenfold.engine.speculation import DraftModel, SpeculationConfig
from sevenfold.engine.warm_up import WarmUpStoppedError
from sevenfold.server.engine_protocol import (
    EngineFullError,
    EngineStats,
    EngineStoppedError,
    Feature,
    GenerationRequest,
    PromptOutput,
    TokenOutput,
)
from sevenfold.server.engine_protocol import MissReason as PublicReason
from sevenfold.server.engine_stats import read_stats

_WARM_PROMPT, _WARM_TOKENS = 600, 4
_JOIN_S = 10.0  # a long prefill does not keep the program from ending
_REASONS: dict[MissReason, PublicReason] = {
    MissReason.TOO_SHORT: "too_short",
    MissReason.NO_KV: "cold",
    MissReason.NO_STATE: "no_state",
    MissReason.EVICTED: "cold",
    MissReason.NO_MEMORY: "cold",
}


_log = logging.getLogger("sevenfold.server")
_Given = TokenOutput | Exception


@dataclass(eq=False)
class _Job:
    """A request on its way through the thread, and where its outputs go.

    inside: what the engine knows of it, once it does.
    queue_s: seconds until the engine began to compute it.
    """

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    given: "asyncio.Queue[_Given]"
    began_s: float
    inside: Request | None = None
    queue_s: float | None = None


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
        self._ranks = source.ranks  # which end with whoever holds them
        self._jobs: dict[str, _Job] = {}
        self._waiting: dict[str, _Job] = {}
        self._steps = 0
        self._moved_s: float | None = None  # when it last computed; None while it has no work
        self._failure: Exception | None = None
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        # What every reading of the stats begins from: it does not change.
        weights = sum(p.numel() * p.element_size() for p in source.model.parameters())
        self._fixed_stats = EngineStats(
            memory_bytes={"weights": weights},
            effective_concurrency=plan.concurrency(self.max_context_tokens),
            longest_context_tokens=min(
                self.max_context_tokens, plan.longest_context_tokens or self.max_context_tokens
            ),
            smallest_cacheable_prefix_tokens=config.grain_tokens,
        )
        self._stats = self._fixed_stats
        self._thread = threading.Thread(target=self._work, name="sevenfold-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Generate one output; closing the iterator cancels it at the engine's next step."""
        job = _Job(request, asyncio.get_running_loop(), asyncio.Queue(), time.monotonic())
        self._order(lambda: self._start(job))
        try:
            while True:
                output = await job.given.get()
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
        """Whether the thread lives, and no step has failed."""
        return self._failure is None and self._thread.is_alive()

    def stalled_s(self) -> float:
        """Seconds since a step last computed something, or work came; 0.0 while there is none.

        Orders that wait are work, and taking them is not enough: cancelled requests do not hide a
        step that never ends.
        """
        moved_s = self._moved_s
        return 0.0 if moved_s is None else time.monotonic() - moved_s

    async def warm_up(self, note: Callable[[str], None]) -> None:
        """Do what happens once, and run two requests, one of them long: no client waits for it.

        Nothing of them stays cached; the counts hold them.

        Args:
            note: told in a line how far it is, from the engine's thread.

        Raises:
            RequestFailedError, EngineStoppedError: the model computes nothing, or the engine fails
                or is stopped.
        """
        began_s = time.monotonic()

        def give_up() -> None:
            note(f"given up after {time.monotonic() - began_s:.1f} s: the server is to stop")

        most = self.max_context_tokens
        new_tokens = max(1, min(_WARM_TOKENS, most - 1))
        sampling = SamplingParams(max_tokens=new_tokens, seed=0, ignore_eos=True)
        lengths = {1, max(1, min(_WARM_PROMPT, most - new_tokens))}
        asked = [
            GenerationRequest(id=f"warm-up-{length}", prompt=(0,) * length, sampling=sampling)
            for length in sorted(lengths)
        ]
        # Before the requests, in the thread that takes the steps.
        self._order(lambda: self._do_once(note))
        try:
            await asyncio.gather(*(self._run_through(request) for request in asked))
        except EngineStoppedError as error:
            if self._failure is None:
                give_up()
                raise
            raise EngineStoppedError(
                f"the engine must take its first steps, got {self._failure}"
            ) from error
        except asyncio.CancelledError:
            # The server has ended before the run under way.
            give_up()
            raise
        except RequestFailedError as error:
            raise RequestFailedError(
                f"{self.model_name} must answer a first request: {error}; its weights may be broken"
            ) from error
        self.forget()

    def _do_once(self, note: Callable[[str], None]) -> None:
        if not self._closed:
            self._engine.warm_up(note)

    async def _run_through(self, request: GenerationRequest) -> None:
        async for _ in self.submit(request):
            continue

    def forget(self) -> None:
        """Drop what is cached and in nobody's use, sessions too; at the next step."""
        self._order(self._engine.clear_cache, refuse=False)

    def stop(self) -> None:
        """Stop after the step under way, and wait for nothing; outputs that have not ended fail."""
        self._engine.stop_warm_up()
        with self._wake:
            self._closed = True
            self._wake.notify()

    def close(self) -> None:
        """Stop, wait for the step under way, and end the other ranks, if there are any."""
        self.stop()
        self._thread.join(_JOIN_S)
        if self._ranks is not None:
            self._ranks.close()

    def _order(self, run: Callable[[], None], *, refuse: bool = True) -> None:
        """Let the thread run something before its next step."""
        with self._wake:
            if self._closed or not self._thread.is_alive():
                if refuse:
                    raise EngineStoppedError("the engine has stopped")
                return
            self._orders.append(run)
            if self._moved_s is None:
                self._moved_s = time.monotonic()
            self._wake.notify()

    def _work(self) -> None:
        try:
            while self._next():
                began_s = time.monotonic()
                events = self._engine.step()
                scheduler = self._engine.scheduler
                if events or scheduler.num_prefilling or scheduler.num_decoding:
                    self._steps += 1
                    self._moved_s = time.monotonic()
                self._note_opened(began_s)
                # First: whoever gets a token finds it in the stats.
                self._stats = read_stats(self._engine, self._fixed_stats, self._steps)
                self._tell(events)
                if self._engine.let_go():
                    self._stats = read_stats(self._engine, self._fixed_stats, self._steps)
        except WarmUpStoppedError:
            pass  # as it was told to
        except Exception as error:  # whatever it is, nobody may wait for this thread any more
            self._failure = error
            _log.exception("the engine has stopped")
        finally:
            with self._wake:
                self._closed = True
                self._refuse()
            for job in list(self._jobs.values()):
                _give(job, EngineStoppedError("the engine has stopped"))

    def _next(self) -> bool:
        """Wait for work and carry out what was ordered; False to stop."""
        while True:
            with self._wake:
                while not (self._orders or self._closed or self._engine.has_work):
                    self._moved_s = None
                    self._wake.wait()
                if self._closed:
                    self._refuse()
                    return False
                num_orders = len(self._orders)
            for _ in range(num_orders):
                self._orders.popleft()()
            if num_orders:
                self._stats = read_stats(self._engine, self._fixed_stats, self._steps)
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
            job.inside = request
        except QueueFullError as error:
            _give(job, EngineFullError(str(error)))
        except ValueError as error:
            _give(job, RequestFailedError(str(error)))
        else:
            self._jobs[asked.id] = self._waiting[asked.id] = job

    def _cancel(self, job: _Job) -> None:
        self._waiting.pop(job.request.id, None)
        if self._jobs.pop(job.request.id, None) is not None:
            self._engine.cancel(job.request.id)

    def _note_opened(self, step_s: float) -> None:
        """Note of requests whose first step this was how long they had waited for it."""
        for name, job in list(self._waiting.items()):
            if job.inside is not None and job.inside.status is not Status.WAITING:
                job.queue_s = step_s - job.began_s
                del self._waiting[name]

    def _tell(self, events: Sequence[TokenEvent]) -> None:
        """Hand a step's tokens to their event loops, each of which wakes once."""
        told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[_Given], _Given]]] = {}
        for event in events:
            job = self._jobs.get(event.request_id)
            if event.finish_reason is not None:
                self._jobs.pop(event.request_id, None)
            if job is not None:
                told.setdefault(job.loop, []).append((job.given, self._output(job, event)))
        for loop, outputs in told.items():
            _call(loop, _put, outputs)

    def _output(self, job: _Job, event: TokenEvent) -> _Given:
        if event.token_id is None:
            message = event.error or f"the output ended: {event.finish_reason}"
            return RequestFailedError(message)
        reason = "stop" if event.finish_reason == "stop" else event.finish_reason and "length"
        found, prompt = event.prompt, None
        if found is not None:
            public = found.public_reason
            missed = None if public is None else _REASONS[public]
            prompt = PromptOutput(found.hit_tokens, missed, job.queue_s, event.prompt_logprobs)
        return TokenOutput(event.token_id, event.text, reason, event.logprobs, prompt)


def _give(job: _Job, output: _Given) -> None:
    _call(job.loop, _put, [(job.given, output)])


def _put(outputs: "Sequence[tuple[asyncio.Queue[_Given], _Given]]") -> None:
    for given, output in outputs:
        given.put_nowait(output)


def _call(loop: asyncio.AbstractEventLoop, run: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(run, *arguments)
    except RuntimeError:
        # The event loop has closed: nobody waits any more.
        return
