"""Outputs under way: admission, deadlines, their tokens merged, and their end however it comes."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sevenfold.server.api_common import PromptDetails, StreamOptions, Usage
from sevenfold.server.engine_protocol import (
    GenerationRequest,
    PromptOutput,
    ServingEngine,
    TokenOutput,
)
from sevenfold.server.errors import NO_RETRY, ApiError, from_engine, too_many
from sevenfold.server.metrics import Metrics
from sevenfold.server.settings import ServerSettings

_LONGEST_RETRY_S = 60
_SMOOTHING = 0.2
_GRACE_S = 2.0  # for the event that says that the deadline has passed


class Desk:
    """Admits requests and knows whether the engine keeps up with them.

    draining: whether no more are admitted. warming_up: whether those that are must wait for what
    happens once.
    """

    def __init__(self, engine: ServingEngine, settings: ServerSettings, metrics: Metrics) -> None:
        self._engine, self._settings, self.metrics = engine, settings, metrics
        self.max_deadline_s = settings.max_deadline_s
        self.draining = self.warming_up = False
        self.under_way = 0
        self._preparing = 0
        self._mean_s = 1.0
        metrics.most.set(settings.max_requests)
        metrics.under_way.set_function(lambda: self.under_way)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Hold a place while a request is rendered and encoded.

        Raises:
            ApiError: there is no room, or the server is about to stop.
        """
        self._check_room(1 + self._preparing)
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def open(self, requests: Sequence[GenerationRequest]) -> "Run":
        """Admit the outputs of one request; whoever gets the run closes it.

        Raises:
            ApiError: there is no room, or the server is about to stop.
        """
        self._check_room(len(requests))
        self.under_way += len(requests)
        return Run(self, self._engine, requests)

    def _check_room(self, more: int) -> None:
        if self.draining:
            raise ApiError(
                503, "the server is stopping", code="draining", headers={"Retry-After": "5"}
            )
        if self.under_way + more > self._settings.max_requests:
            retry_s = min(max(1, math.ceil(self._mean_s)), _LONGEST_RETRY_S)
            raise too_many(retry_s)

    def close(self, num_outputs: int, took_s: float) -> None:
        """Take note of a run's end."""
        self.under_way -= num_outputs
        self._mean_s += _SMOOTHING * (took_s - self._mean_s)
        self.metrics.whole.observe(took_s)

    def healthy(self) -> bool:
        """Whether the engine is well, and computes while it has something to do.

        Who waits for it does not count: clients that give up early hide nothing.
        """
        stalled = self._engine.stalled_s() > self._settings.stall_s
        return self._engine.healthy() and (self.warming_up or not stalled)


@dataclass
class _Progress:
    """How far one output has come."""

    last_s: float
    first_s: float = 0.0
    tokens: int = 0
    prompt: PromptOutput = field(default_factory=PromptOutput)
    ended: bool = False


class Run:
    """The outputs of one admitted request."""

    def __init__(
        self, desk: Desk, engine: ServingEngine, requests: Sequence[GenerationRequest]
    ) -> None:
        self._desk, self._engine, self._requests = desk, engine, requests
        self._began_s = time.monotonic()
        self._progress = [_Progress(self._began_s) for _ in requests]
        self._queue: asyncio.Queue[tuple[int, TokenOutput | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def outputs(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """Give the tokens of all outputs as they come, each with its output's index.

        Raises:
            ApiError: an output failed, or the deadline has passed.
        """
        self._tasks = [
            asyncio.create_task(self._pump(n, request)) for n, request in enumerate(self._requests)
        ]
        while not all(one.ended for one in self._progress):
            index, output = await self._next()
            if self._progress[index].ended:
                continue  # it was stopped while this lay in the queue
            if isinstance(output, Exception):
                self._count_rest("error")
                raise from_engine(output) from output
            self._note(index, output)
            yield index, output

    @property
    def limit_s(self) -> float:
        """Seconds after which nothing more is sent, to whoever may not be reading."""
        deadline_s = self._requests[0].deadline_s
        most_s = self._desk.max_deadline_s if deadline_s is None else deadline_s
        return most_s + _GRACE_S

    async def stop(self, index: int, reason: str) -> None:
        """End one output before its time; it is not heard of again."""
        self._end(self._progress[index], reason)
        await _cancelled(self._tasks[index : index + 1])

    async def close(self) -> None:
        """Cancel what is still under way, and leave."""
        if self._closed:
            return
        self._closed = True
        self._count_rest("cancelled")
        try:
            await _cancelled(self._tasks)
        finally:
            self._desk.close(len(self._requests), time.monotonic() - self._began_s)

    def usage(self, num_prompts: int) -> Usage:
        """Return the tokens so far; outputs of one prompt, which follow each other, share it."""
        step = len(self._requests) // num_prompts
        new = sum(one.tokens for one in self._progress)
        old = sum(len(request.prompt) for request in self._requests[::step])
        first = [one.prompt for one in self._progress[::step]]
        missed = next((one.miss_reason for one in first if one.miss_reason), None)
        return Usage(
            prompt_tokens=old,
            completion_tokens=new,
            total_tokens=old + new,
            prompt_tokens_details=PromptDetails(
                cached_tokens=sum(one.cached_tokens for one in first), cache_miss_reason=missed
            ),
        )

    async def _pump(self, index: int, request: GenerationRequest) -> None:
        try:
            stream = self._engine.submit(request)
            async with contextlib.AsyncExitStack() as stack:
                close = getattr(stream, "aclose", None)
                if close is not None:
                    stack.push_async_callback(close)
                async for output in stream:
                    self._queue.put_nowait((index, output))
        except Exception as error:  # whatever it is ends this request, and no other
            self._queue.put_nowait((index, error))

    async def _next(self) -> tuple[int, TokenOutput | Exception]:
        deadline_s = self._requests[0].deadline_s
        left_s = None if deadline_s is None else self._began_s + deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await self._queue.get()
        except TimeoutError as error:
            self._count_rest("deadline")
            raise ApiError(
                504,
                f"the request must end within its deadline of {deadline_s:g} s, and did not",
                param="deadline_s",
                code="deadline_exceeded",
                headers=NO_RETRY,
            ) from error

    def _note(self, index: int, output: TokenOutput) -> None:
        metrics, one = self._desk.metrics, self._progress[index]
        now = time.monotonic()
        (metrics.next_token if one.tokens else metrics.first_token).observe(now - one.last_s)
        one.first_s = one.first_s if one.tokens else now
        one.last_s = now
        one.tokens += 1
        metrics.new_tokens.inc()
        if output.prompt is not None:
            one.prompt = output.prompt
            if output.prompt.queue_s is not None:
                metrics.queue.observe(output.prompt.queue_s)
                metrics.prefill.observe(now - self._began_s - output.prompt.queue_s)
            metrics.prompt_tokens.inc(len(self._requests[index].prompt))
            metrics.cached_tokens.inc(output.prompt.cached_tokens)
            if output.prompt.miss_reason is not None:
                metrics.misses.labels(output.prompt.miss_reason).inc()
        if output.finish_reason is not None:
            self._end(one, output.finish_reason)

    def _end(self, one: _Progress, reason: str) -> None:
        """Note that an output has come to an end of its own."""
        one.ended = True
        self._desk.metrics.outputs.labels(reason).inc()
        self._desk.metrics.decode.observe(one.last_s - one.first_s)

    def _count_rest(self, reason: str) -> None:
        for one in self._progress:
            if not one.ended:
                one.ended = True
                self._desk.metrics.outputs.labels(reason).inc()


class StreamUsage:
    """What a stream says of its tokens: at its end, with every chunk, or nothing."""

    def __init__(self, options: StreamOptions | None, run: Run, num_prompts: int) -> None:
        self._options, self._run, self._num_prompts = options or StreamOptions(), run, num_prompts
        self.at_end = self._options.include_usage

    def so_far(self) -> dict[str, Any]:
        """Return the field of a chunk, if every chunk has it."""
        return self.whole() if self._options.continuous_usage_stats else {}

    def whole(self) -> dict[str, Any]:
        """Return the field with the tokens up to now."""
        return {"usage": self._run.usage(self._num_prompts).model_dump()}


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
