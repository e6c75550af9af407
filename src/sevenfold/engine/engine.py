"""Continuous batching: requests come and go, and each step computes what the scheduler says."""

import time
from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Tokenizer

from sevenfold.engine.ahead import Ahead, Chosen
from sevenfold.engine.cache import CacheCounters, Fresh, Placement, SessionCache, SessionLimits
from sevenfold.engine.choosing import Choosing
from sevenfold.engine.constraint import Constraint
from sevenfold.engine.events import TokenEvent
from sevenfold.engine.first_use import log_progress, warm_up
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.options import check_invariant, worker_config
from sevenfold.engine.request import Request, Status
from sevenfold.engine.rows import Row
from sevenfold.engine.sampling import Output, SamplingParams, bad_word_tokens
from sevenfold.engine.scheduler import DecodeRow, PrefillChunk, Scheduler, SchedulerConfig, Step
from sevenfold.engine.speculation import (
    Drafted,
    DraftModel,
    SpeculationConfig,
    SpeculationCounters,
    Speculator,
    Taken,
    Walk,
    build_drafter,
    check_speculates,
)
from sevenfold.engine.tensor_parallel import Ranks
from sevenfold.engine.transfer import upload
from sevenfold.engine.underway import Underway
from sevenfold.engine.worker import Note, Worker
from sevenfold.models import HybridModel


class Engine:
    """A model, its memory and its scheduler; single-threaded, one step after another.

    submit -> step -> events -> step -> ...
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: Tokenizer,
        plan: MemoryPlan,
        config: SchedulerConfig,
        *,
        sessions: SessionLimits | None = None,
        decode_batch_sizes: Sequence[int] | None = None,
        speculation: SpeculationConfig | None = None,
        draft: DraftModel | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Allocate the plan's memory.

        Args:
            model: to serve; bf16, fp16 or fp32.
            tokenizer: its own.
            plan: of the model's config, with kv_element_bytes of its dtype, and with ring_tokens
                where it speculates.
            config: the scheduler's limits.
            sessions: how many conversations may keep their prefixes; None takes the defaults.
            decode_batch_sizes: rows of decoding steps that a GPU records as graphs; None takes
                device.decode_batch_sizes, and none records nothing, prefills neither.
            speculation: how to guess tokens, several of which one step checks; None guesses none.
            draft: the smaller model that guesses, with a DraftModelConfig.
            ranks: those that hold the other parts of the model; None where it is whole.

        Raises:
            ConfigError: decode_batch_sizes are given for a CPU, or do not rise from 1; speculation,
                draft and plan do not go together.
        """
        self._tokenizer, eos = tokenizer, model.config.eos_token_id
        self._eos = () if eos is None else (eos,)
        if config.batch_invariant:
            check_invariant(plan, speculation)
        how = worker_config(config, decode_batch_sizes, speculation)
        self._worker = Worker(model, plan, how) if ranks is None else ranks.lead(plan, how)
        self.cache = SessionCache(
            plan,
            headroom_tokens=config.opening_headroom_tokens,
            grain_tokens=how.chunk_tokens,
            limits=sessions or SessionLimits(),
        )
        self.scheduler, self._limits = Scheduler(self.cache, config), config
        self._underway: dict[str, Underway] = {}
        self._choosing = Choosing(self._underway, model.config.vocab_size, model.device)
        self._ahead = Ahead(self._worker, self.cache, self.scheduler)
        check_speculates(speculation, draft, plan)
        self._speculator: Speculator | None = None
        if speculation is not None:
            drafter = build_drafter(speculation, draft, model, tokenizer)
            sampler_of = self._choosing.sampler_of
            self._speculator = Speculator(speculation, drafter, self._worker, sampler_of)
        self.num_nonfinite = 0  # requests that failed because their logits were not finite
        self._guesses = False  # whether any request has guesses for the next step

    def warm_up(self, note: Note = log_progress) -> None:
        """Do what happens once before a request waits for it; see engine.first_use.warm_up."""
        if self._speculator is not None and self._worker.has_first_times:
            self._speculator.warm_up(lambda: self._worker.is_stopping)
        warm_up(self._worker, self._limits, note)

    def stop_warm_up(self) -> None:
        """End warm_up, which another thread runs, before its next run: WarmUpStoppedError there."""
        self._worker.stop_warm_up()

    def submit(
        self, request: Request, params: SamplingParams, constraint: Constraint | None = None
    ) -> None:
        """Let a request wait for its turn.

        Args:
            request: a new one, with params' max_tokens.
            params: what it asks of the sampler.
            constraint: which tokens may come next; None allows all.

        Raises:
            QueueFullError: too many wait.
            ValueError: it cannot fit into memory, or breaks another rule; nothing was taken.
        """
        if request.max_tokens != params.max_tokens:
            raise ValueError(
                f"request.max_tokens must be params.max_tokens = {params.max_tokens}, got "
                f"{request.max_tokens}"
            )
        words = bad_word_tokens(self._tokenizer, params.bad_words) if params.bad_words else ()
        if params.prompt_logprobs is not None:
            # The cache holds states, not logits: every token of the prompt has to be computed.
            request.max_cached_tokens = 0
        self.scheduler.submit(request)
        ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *self._eos)
        output = Output(params, request.prompt, ends, request.generated, words)
        self._underway[request.id] = Underway(request, output, self._tokenizer, constraint)

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step; returns whether it was under way."""
        return self.scheduler.cancel(request_id)

    def let_go(self) -> bool:
        """Give back the memory of requests whose last token has come, as a step does first.

        Returns:
            Whether there were any.
        """
        return self.scheduler.let_go()

    def clear_cache(self) -> None:
        """Drop what is cached and in nobody's use, sessions too; what ended before is in none."""
        self.let_go()
        self.cache.clear()

    def abandon(self, message: str) -> None:
        """End every request under way with an error: a step of theirs did not come to its end."""
        self._ahead.forget()
        for underway in self._underway.values():
            if underway.request.status is not Status.ENDED:
                self.scheduler.fail(underway.request, message)

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_work

    def counters(self) -> CacheCounters:
        """What the prefix cache has done."""
        return self.cache.counters()

    def step(self) -> list[TokenEvent]:
        """Compute one step: decode rows first, then prefill chunks, each in one run of the model.

        On a GPU the next step begins before this one's tokens are on the host, where that can be:
        see engine.ahead. What a step returns is the same.

        Returns:
            What it gave, the ends of cancelled and late requests included.
        """
        began_s = time.perf_counter()
        self._propose()
        step = self.scheduler.step()
        fresh: Fresh | None = self.cache.take_fresh()
        # What comes from the host is known in the cache already: it must be there come what may.
        is_moved = bool(fresh.saved or fresh.loaded)
        if step.decodes or len(step.prefills) != 1 or is_moved:
            self._worker.prepare(fresh)
            fresh = None
        if self._speculator is not None:
            self._speculator.forget(step.preempted, step.ended)
        events = [self._end(request) for request in step.ended]
        if self._speculator is not None and any(row.draft_tokens for row in step.decodes):
            events += self._decode_drafts(self._speculator, step.decodes, began_s)
            prefilled = self._prefill(step.prefills)
            self._speculator.read((), step.prefills)
            events += self._take(prefilled)
        else:
            events += self._decode_plainly(step, fresh, began_s)
        return [event for event in events if event is not None]

    def speculation_counters(self) -> SpeculationCounters | None:
        """What speculation has done; None where the engine guesses no tokens."""
        return None if self._speculator is None else replace(self._speculator.counters)

    def _propose(self) -> None:
        """Guess what follows for the requests that decode."""
        if self._speculator is None:
            return
        underway = self._underway.values()
        decoding = [one for one in underway if one.request.status is Status.DECODING]
        # Guesses for a step that runs already can be checked in the one behind it.
        self._guesses = self._speculator.propose(
            [(one.request, one.output) for one in decoding],
            is_under_way=self._ahead.chosen is not None,
        )

    def _decode_plainly(
        self, step: Step, fresh: Fresh | None, began_s: float
    ) -> list[TokenEvent | None]:
        """Compute a step without guesses; where the next has none either, begin that as well."""
        was_ahead = self._ahead.chosen is not None
        # Both are launched before the host waits for either.
        decoded, prefilled = self._decode(step), self._prefill(step.prefills, fresh)
        # A prompt's last chunk comes before the first guess of what follows it, but for guesses
        # that are watched first.
        is_guessed = self._speculator is not None and not self._speculator.watches
        if not self._guesses and not (is_guessed and prefilled):
            self._run_ahead([one for one in (decoded, prefilled) if one is not None])
        if self._speculator is not None:
            self._speculator.read([row.request for row in step.decodes], step.prefills)
        events = self._take(decoded) + self._take(prefilled)
        if not self.scheduler.num_decoding:
            self._ahead.forget()
        if self._speculator is not None:
            is_ahead = was_ahead and self._ahead.chosen is not None
            seconds = None if step.prefills else time.perf_counter() - began_s
            is_steady = is_ahead or self._worker.ahead is None
            self._speculator.note_plain(len(step.decodes), seconds, is_steady=is_steady)
        return events

    def _decode_drafts(
        self, speculator: Speculator, rows: Sequence[DecodeRow], began_s: float
    ) -> list[TokenEvent | None]:
        requests = [row.request for row in rows]
        walks = self._check(speculator, rows)
        checked = {walk.request.id for walk in walks if walk.is_finite}
        # A guess whose vectors are not finite may spoil its draft: such a row goes without one.
        plain = [request for request in requests if request.id not in checked]
        events = [event for walk in walks if walk.is_finite for event in self._take_walk(walk)]
        events += self._take(self._step(plain))
        speculator.note_drafted(walks, len(rows), time.perf_counter() - began_s)
        return events

    def _check(self, speculator: Speculator, rows: Sequence[DecodeRow]) -> list[Walk]:
        """Check the drafts of decode rows that have one."""
        drafted = []
        for request, num_guesses, _ in rows:
            if num_guesses:
                row = self._next_row(request, 1 + num_guesses)
                drafted.append(Drafted(self._underway[request.id], row, num_guesses))
        self._choosing.forget()
        return speculator.check(drafted, [row.request for row in rows])

    def _take_walk(self, walk: Walk) -> list[TokenEvent | None]:
        underway = self._underway[walk.request.id]
        if walk.is_refused:
            self.scheduler.fail(walk.request, underway.refusal)
            return []
        return self._record(underway, walk.taken, stopped=walk.stopped)

    def _decode(self, step: Step) -> Chosen | None:
        """Choose one token of each request, if there are any; most often that is under way."""
        chosen = self._ahead.take(step.decodes) or self._step([r.request for r in step.decodes])
        return chosen.kept() if chosen and step.prefills else chosen

    def _run_ahead(self, parts: Sequence[Chosen]) -> None:
        """Begin the next decoding step, if nothing of it depends on this one's tokens but ids."""
        requests = [request for chosen in parts for request in chosen.requests if request]
        if not all(self._underway[request.id].chooses_blind for request in requests):
            return
        begun = self._ahead.launch(parts, self._choosing.new_sampler)
        if begun is not None:
            logits, best = begun.stepped
            self._ahead.chosen = self._choosing.choose(begun.requests, logits, begun.sampler, best)
            self._choosing.forget()  # this one is ahead of the outputs from now on

    def _step(self, requests: list[Request]) -> Chosen | None:
        """Compute one token of each request, if there are any."""
        if not requests:
            return None
        rows = [self._next_row(request, 1) for request in requests]
        logits = self._worker.run(rows)
        return self._choosing.choose(requests, logits, self._choosing.kept_sampler(requests))

    def _prefill(self, chunks: Sequence[PrefillChunk], fresh: Fresh | None = None) -> Chosen | None:
        """Run the next chunks of prompts; of one alone, with what it finds to be made ready."""
        if not chunks:
            return None
        placed = [(chunk, self.cache.placement(chunk.request)) for chunk in chunks]
        rows = [self._row(chunk.request, chunk.end, place) for chunk, place in placed]
        rows = [self._underway[c.request.id].scoring(r) for c, r in zip(chunks, rows, strict=True)]
        found = [(place.restore, place.state) for _, place in placed]
        restored = [(a, b) for a, b in found if a is not None and b is not None]
        if fresh is None:
            self._worker.restore([a for a, _ in restored], [b for _, b in restored])
            logits, best = self._worker.run(rows), None
        else:
            logits, best = self._worker.prefill(fresh, restored, rows[0])
        self._note_launched(chunks)
        yielding = [n for n, chunk in enumerate(chunks) if chunk.yields_token]
        for chunk in chunks:
            if not chunk.yields_token:
                self.scheduler.record(chunk.request, ())
        if not yielding:
            return None
        requests = [chunks[n].request for n in yielding]
        if len(yielding) < len(chunks):
            logits = logits[upload(yielding, logits.device)]
        return self._choosing.choose(requests, logits, self._choosing.new_sampler(requests), best)

    def _note_launched(self, chunks: Sequence[PrefillChunk]) -> None:
        """Do what the first token needs besides, while the device computes."""
        for chunk in chunks:
            underway = self._underway[chunk.request.id]
            underway.prompt = underway.prompt or self.cache.lookup(chunk.request)
            self.cache.note_launched(chunk.request)
            underway.begin_text()

    def _next_row(self, request: Request, num_tokens: int) -> Row:
        end = request.num_computed_tokens + num_tokens
        return self._row(request, end, self.cache.placement(request))

    def _row(self, request: Request, end: int, placement: Placement) -> Row:
        past = request.num_computed_tokens
        return Row(
            tokens=request.tokens_between(past, end),
            past=past,
            state=placement.state,
            pages=self.cache.pages(request),
            snapshots={at: s for at, s in placement.snapshots.items() if past < at <= end},
            seed=self._underway[request.id].output.params.seed or 0,
        )

    def _take(self, chosen: Chosen | None) -> list[TokenEvent | None]:
        """Wait for the tokens of a run, and record them."""
        if chosen is None:
            return []
        ids, finite = chosen.arriving.numbers()
        events: list[TokenEvent | None] = []
        for n, (request, token) in enumerate(zip(chosen.requests, ids, strict=True)):
            if request is None:
                continue
            one = self._underway[request.id]
            if not finite[n]:
                self.num_nonfinite += 1
                self.scheduler.fail(
                    one.request, "the model's logits are not finite for this request"
                )
            elif not one.accepts(token):
                self.scheduler.fail(one.request, one.refusal)
            else:
                text, stopped = one.push(token)
                taken = [Taken(token, text, chosen.logprobs[n])]
                events += self._record(one, taken, stopped=stopped)
        return events

    def _record(
        self, underway: Underway, taken: Sequence[Taken], *, stopped: bool
    ) -> list[TokenEvent | None]:
        """Record a request's next tokens, and say what each of them added."""
        request = underway.request
        is_first = not request.generated
        self.scheduler.record(request, [one.token for one in taken], stopped=stopped)
        events: list[TokenEvent | None] = [
            TokenEvent(request.id, one.token, one.text, None, one.logprobs) for one in taken[:-1]
        ]
        token, text, logprobs = taken[-1]
        reason = request.finish_reason
        if reason is not None:
            text += underway.text.finish()
            reason = "stop" if underway.text.stopped else reason
        prompt = underway.prompt if is_first else None
        scored = underway.take_scored() if is_first else None
        event = TokenEvent(request.id, token, text, reason, logprobs, prompt, scored)
        return [*events, event]

    def _end(self, request: Request) -> TokenEvent | None:
        """The last event of a request; one that ended by a token has had it."""
        underway = self._underway[request.id]
        if underway.request is not request:
            return None  # its last token has come, and somebody has taken its id since
        del self._underway[request.id]
        if request.finish_reason in ("stop", "length"):
            return None
        text, reason = underway.text.finish(), request.finish_reason
        return TokenEvent(request.id, None, text, reason, error=request.error)
