"""What the server asks of an engine, and nothing more: the one seam between the two."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from sevenfold.config import SevenfoldError
from sevenfold.engine import SamplingParams
from sevenfold.engine.sampling import Logprobs

# What an engine may lack: a request that asks for it is then refused by its name.
Feature = Literal["constraint", "prompt_logprobs", "priority", "session"]
MissReason = Literal["cold", "no_state", "too_short"]


class EngineFullError(SevenfoldError, RuntimeError):
    """The engine takes no more requests now."""


class EngineStoppedError(SevenfoldError, RuntimeError):
    """The engine has stopped, and takes no requests."""


class TokenConstraint(Protocol):
    """Which tokens may come next in one output; it advances with the output."""

    def fill(self, mask: np.ndarray) -> None:
        """Write the allowed tokens, one bit each, into a row [ceil(vocab_size / 32)] int32."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; False if it may not follow."""
        ...

    def finished(self) -> bool:
        """Whether nothing more can follow, so that the output ends with "stop"."""
        ...

    def problem(self) -> str | None:
        """What keeps it from knowing what may come next, for the caller; None if nothing does."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """One output to generate.

    id: names the output; no two under way share one.
    prompt: token ids, one or more; with sampling.max_tokens at most max_context_tokens.
    sampling: how tokens are chosen, and when the output ends; prompt_logprobs needs the feature of
        that name.
    constraint: masks the logits before the choice; needs the feature "constraint".
    priority: the greater, the sooner; other than 0 needs the feature "priority".
    deadline_s: seconds from submission after which nobody waits for the output.
    salt: outputs share cached tokens only under one salt.
    marks: rising token counts where a turn of the conversation ends, or what other requests share:
        places for snapshots.
    session: a conversation that wants its snapshot pinned; needs the feature "session".
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    constraint: TokenConstraint | None = None
    priority: int = 0
    deadline_s: float | None = None
    salt: bytes = b""
    marks: tuple[int, ...] = ()
    session: str | None = None


@dataclass(frozen=True)
class PromptOutput:
    """What became of the prompt: tokens found in the cache, and if there were none, why.

    queue_s: seconds until its first token was computed on; None if the engine does not know.
    logprobs: one entry for each prompt token but the first, if they were asked for.
    """

    cached_tokens: int = 0
    miss_reason: MissReason | None = None
    queue_s: float | None = None
    logprobs: tuple[Logprobs, ...] | None = None


@dataclass(frozen=True)
class TokenOutput:
    """One new token, and the text that may be shown now, in whole characters.

    finish_reason: None until the last token of the output.
    prompt: comes with the first token.
    """

    token_id: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: Logprobs | None = None
    prompt: PromptOutput | None = None


@dataclass(frozen=True)
class Pool:
    """Places of one kind of memory: how many are taken, of how many, of which size."""

    used: int = 0
    total: int = 0
    bytes_each: int = 0


@dataclass(frozen=True)
class HostStats:
    """Cached prefixes in the host's memory, where those go that have to make room.

    slabs: of that memory, now.
    kept, refused, evicted: prefixes, since the start: copied there, without room, dropped from it.
    restored, restored_tokens, restored_bytes: those that came back, since the start.
    """

    slabs: Pool
    kept: int
    refused: int
    evicted: int
    restored: int
    restored_tokens: int
    restored_bytes: int


@dataclass(frozen=True)
class EngineStats:
    """What an engine tells of itself, now and since it started.

    running, waiting: requests now; those that wait by what keeps the first of them, 0 for the rest.
    steps: that computed something; while it rises, requests make progress.
    slabs, pages, states, snapshots: memory now.
    memory_bytes: bytes now by what holds them ("weights", "kv", "states", ...).
    prompt_tokens, cached_tokens: since the start; their ratio is the hit rate.
    potential_tokens: prompt tokens computed although they had been seen before.
    misses: prompts that found nothing in the cache, by why; "other_salt" is for operators alone.
    recomputed_tokens: computed again after a preemption.
    snapshots_taken, snapshots_refused, snapshots_evicted: cached states that were kept, that were
        not worth their memory, and that made room.
    pages_dropped: cached keys and values that no snapshot reached any more.
    drafts, drafted_tokens, accepted_tokens: checks of guesses, guesses, and those that were right.
    nonfinite_outputs: that failed because their logits were not finite.
    effective_concurrency: requests of full length that memory holds at a time.
    longest_context_tokens: that memory holds for one request.
    sessions: conversations that keep their prefix now.
    smallest_cacheable_prefix_tokens: None if nothing is cached.
    host: None if no prefix goes to the host's memory.
    """

    running: int = 0
    waiting: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    slabs: Pool = Pool()
    pages: Pool = Pool()
    states: Pool = Pool()
    snapshots: Pool = Pool()
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    potential_tokens: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)
    recomputed_tokens: int = 0
    snapshots_taken: int = 0
    snapshots_refused: int = 0
    snapshots_evicted: int = 0
    pages_dropped: int = 0
    preemptions: int = 0
    nonfinite_outputs: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    effective_concurrency: int = 1
    longest_context_tokens: int = 0
    sessions: int = 0
    smallest_cacheable_prefix_tokens: int | None = None
    host: HostStats | None = None


class ServingEngine(Protocol):
    """An engine that a server can stand on.

    Methods are called from one event loop and return at once; what takes long happens elsewhere.
    """

    model_name: str
    max_context_tokens: int
    vocab_size: int
    eos_token_id: int | None
    tokenizer: Tokenizer
    features: frozenset[Feature]

    def submit(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Generate one output; closing the iterator cancels it and frees what it holds.

        Raises (by the iterator):
            RequestFailedError: this output cannot go on.
            EngineFullError: too many requests wait.
            EngineStoppedError: the engine has stopped.
        """
        ...

    def stats(self) -> EngineStats:
        """Say what is going on."""
        ...

    def healthy(self) -> bool:
        """Whether it can compute: it has not stopped."""
        ...

    def stalled_s(self) -> float:
        """Seconds since it last computed something or found work; 0.0 while it has none."""
        ...

    def forget(self) -> None:
        """Drop what is cached and in nobody's use, sessions too; at the next step."""
        ...

    def stop(self) -> None:
        """Begin to stop, as a signal's handler may: outputs end with EngineStoppedError."""
        ...

    def close(self) -> None:
        """Stop, and wait for the end."""
        ...
