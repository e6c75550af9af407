"""The offline engine behind the server's seam: one output at a time, in a thread of its own."""

import asyncio
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine import LLM, Decoder, TextStream
from sevenfold.engine.llm import PREFILL_CHUNK_TOKENS
from sevenfold.engine.sampling import Logprobs, Output, Sampler, SamplingParams, read_logprobs
from sevenfold.models.accounting import kv_bytes, state_bytes
from sevenfold.server.engine_protocol import (
    EngineStats,
    EngineStoppedError,
    Feature,
    GenerationRequest,
    Pool,
    PromptOutput,
    RequestFailedError,
    TokenConstraint,
    TokenOutput,
)

_JOIN_S = 10.0  # a long prefill does not keep the program from ending


@dataclass(eq=False)
class _Job:
    """A request on its way through the thread; give hands its outputs to the event loop."""

    request: GenerationRequest
    give: Callable[[TokenOutput | Exception], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class OfflineEngine:
    """Serves by sevenfold.engine.Decoder, without batching and without a prefix cache."""

    features: frozenset[Feature] = frozenset({"constraint", "prompt_logprobs"})

    def __init__(self, llm: LLM, model_name: str) -> None:
        self.model_name = model_name
        self.tokenizer = llm.tokenizer
        config = llm.model.config
        self.max_context_tokens = config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self.eos_token_id = config.eos_token_id
        self._llm = llm
        parameters = llm.model.parameters()
        self._weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: set[_Job] = set()
        self._running: _Job | None = None
        self._prompt_tokens = 0
        self._context_tokens = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sevenfold-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Generate one output; closing the iterator cancels it after the token under way."""
        if self._closed:
            raise EngineStoppedError("the engine has stopped")
        loop = asyncio.get_running_loop()
        given: asyncio.Queue[TokenOutput | Exception] = asyncio.Queue()

        def give(output: TokenOutput | Exception) -> None:
            loop.call_soon_threadsafe(given.put_nowait, output)

        job = _Job(request, give)
        self._waiting.add(job)
        self._jobs.put(job)
        try:
            while True:
                output = await given.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            job.cancelled.set()
            self._waiting.discard(job)

    def stats(self) -> EngineStats:
        """Say what is going on."""
        config, model = self._llm.model.config, self._llm.model
        running = self._running is not None
        kv = kv_bytes(config, self._context_tokens, model.dtype.itemsize) if running else 0
        states = state_bytes(config) * running
        memory = {"weights": self._weight_bytes, "states": states, "kv": kv}
        return EngineStats(
            running=int(running),
            waiting={"engine_busy": len(self._waiting)},
            states=Pool(int(running), 1, state_bytes(config)),
            memory_bytes=memory,
            prompt_tokens=self._prompt_tokens,
        )

    def healthy(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the token under way; outputs that have not ended fail."""
        self._closed = True
        self._jobs.put(None)
        running = self._running
        if running is not None:
            running.cancelled.set()
        self._thread.join(_JOIN_S)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None or self._closed:
                self._refuse(job)
                return
            if job.cancelled.is_set():
                continue
            self._waiting.discard(job)
            self._running = job
            try:
                self._generate(job)
            except Exception as error:  # it ends this output, and no other
                _give(job, error)
            finally:
                self._running = None

    def _refuse(self, job: _Job | None) -> None:
        while job is not None or not self._jobs.empty():
            if job is not None:
                _give(job, EngineStoppedError("the engine has stopped"))
            job = None if self._jobs.empty() else self._jobs.get()

    def _generate(self, job: _Job) -> None:
        request = job.request
        params, prompt = request.sampling, request.prompt
        self._prompt_tokens += len(prompt)
        self._context_tokens = len(prompt) + params.max_tokens
        known = self._prompt_logprobs(request)
        decoder = Decoder(self._llm.model, [prompt], capacity_tokens=self._context_tokens)
        line = _Line(self._llm, request)
        logits = decoder.prefill(PREFILL_CHUNK_TOKENS)
        about = PromptOutput(miss_reason="cache_off", logprobs=known)
        while not job.cancelled.is_set():
            output = line.advance(logits, about)
            _give(job, output)
            if output.finish_reason is not None:
                return
            about = None
            logits = decoder.step([output.token_id])
        _give(job, EngineStoppedError("the output was cancelled"))

    @torch.inference_mode()
    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[Logprobs, ...] | None:
        if request.prompt_logprobs is None:
            return None
        device = self._llm.model.device
        ids = torch.tensor(request.prompt, device=device)
        asked = SamplingParams(logprobs=request.prompt_logprobs)
        hidden = self._llm.model.hidden(ids[None]).hidden[0]
        found: list[Logprobs] = []
        # By parts: all logits of a long prompt would not fit.
        for first in range(0, len(ids) - 1, PREFILL_CHUNK_TOKENS):
            last = min(first + PREFILL_CHUNK_TOKENS, len(ids) - 1)
            logits = self._llm.model.logits(hidden[first:last])
            rows = read_logprobs(logits, ids[first + 1 : last + 1], [asked] * (last - first))
            found += [row for row in rows if row is not None]
        return tuple(found)


class _Line:
    """One output being generated."""

    def __init__(self, llm: LLM, request: GenerationRequest) -> None:
        params = request.sampling
        self._request, self._params = request, params
        self._vocab_size = llm.model.config.vocab_size
        self._text = TextStream(llm.tokenizer, params.stop)
        self._output = Output(params, list(request.prompt), llm.end_ids(params))
        self._sampler = Sampler([self._output], self._vocab_size, llm.model.device)

    def advance(self, logits: Tensor, prompt: PromptOutput | None) -> TokenOutput:
        """Choose the next token from logits [1, vocab_size], and say what it added."""
        if not torch.isfinite(logits).all():
            raise RequestFailedError("the model's logits are not finite for this request")
        constraint = self._request.constraint
        allowed = logits if constraint is None else _masked(logits, constraint)
        tokens = self._sampler.choose(allowed)
        [logprobs] = read_logprobs(logits, tokens, [self._params])
        token = int(tokens[0])
        self._output.tokens.append(token)
        ended = token in self._output.end_ids
        if constraint is not None and not ended and not constraint.accept(token):
            raise RequestFailedError("the output left its grammar")
        shown = self._text.finish() if ended else self._text.push(token)
        reason = self._reason(ended, constraint)
        if reason is not None and not ended:
            shown += self._text.finish()
            reason = "stop" if self._text.stopped else reason
        return TokenOutput(token, shown, reason, logprobs, prompt)

    def _reason(self, ended: bool, constraint: TokenConstraint | None):
        if ended or self._text.stopped:
            return "stop"
        if constraint is not None and constraint.finished():
            return "stop"
        return "length" if len(self._output.tokens) == self._params.max_tokens else None


def _masked(logits: Tensor, constraint: TokenConstraint) -> Tensor:
    """Logits with -inf where the constraint allows no token."""
    vocab_size = logits.shape[-1]
    mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    constraint.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size]
    if not bits.any():
        raise RequestFailedError("no token can follow in the output's grammar")
    allowed = torch.from_numpy(bits.astype(bool)).to(logits.device)
    return logits.masked_fill(~allowed, -math.inf)


def _give(job: _Job, output: TokenOutput | Exception) -> None:
    try:
        job.give(output)
    except RuntimeError:
        # The event loop has closed: nobody waits any more.
        job.cancelled.set()
