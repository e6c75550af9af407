"""One request, from its submission to its end."""

import math
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Literal

from sevenfold.config import SevenfoldError
from sevenfold.engine.token_ids import TokenIds

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Status(Enum):
    """Where a request stands; a preempted one is waiting again."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class RequestFailedError(SevenfoldError, RuntimeError):
    """One request could not go on; the others do."""


# eq=False: a request is itself, and a key of dictionaries, however its fields change.
@dataclass(eq=False, slots=True)
class Request:
    """A prompt, what its caller wants, and how far it has come.

    The caller sets the first fields; the scheduler alone writes those after session, but for the
    counts of guesses, which speculation writes. The last token is known before it is computed, so
    that num_computed_tokens < num_tokens always holds.

    Args:
        id: names the request; no two that are under way share one.
        prompt: token ids, one or more, from 0 to 2**32 - 1; TokenIds are packed already.
        max_tokens: new tokens at most, one or more.
        priority: the greater, the sooner; default 0.
        deadline_s: when to give the request up, on the scheduler's clock; None is never.
        marks: token counts, rising, from 1 to the prompt's length, where a turn ends or the caller
            says so: places where another request is likely to leave this one's path, and a snapshot
            pays.
        salt: requests share cached tokens only under one salt; the server derives it from the API
            key.
        draft_tokens: tokens to speculate in each decoding step at most; may be changed between
            steps, as an engine that speculates does; default 0.
        max_cached_tokens: tokens that it may take from the prefix cache at most; may be changed
            while it waits; default None, all that it finds.
        session: a conversation, under the salt, that keeps what this request leaves in the prefix
            cache for its next one; None keeps nothing beyond what everybody may find.

    Raises:
        ValueError: an argument breaks its rule.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    deadline_s: float | None = None
    marks: tuple[int, ...] = ()
    salt: bytes = b""
    draft_tokens: int = 0
    session: str | None = None
    max_cached_tokens: int | None = None
    generated: list[int] = field(default_factory=list, init=False)
    packed: bytes = field(init=False, repr=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_drafted_tokens: int = field(default=0, init=False)
    num_accepted_tokens: int = field(default=0, init=False)
    status: Status = field(default=Status.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id must have one character or more, got ''")
        prompt = self.prompt if isinstance(self.prompt, TokenIds) else TokenIds(self.prompt)
        if not prompt:
            raise ValueError("prompt must have at least one token, got ()")
        self.prompt, self.packed = prompt, prompt.packed
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if self.deadline_s is not None and not math.isfinite(self.deadline_s):
            raise ValueError(f"deadline_s must be finite or None, got {self.deadline_s}")
        if self.draft_tokens < 0:
            raise ValueError(f"draft_tokens must be 0 or more, got {self.draft_tokens}")
        if self.marks:
            self._check_marks()

    def _check_marks(self) -> None:
        bounded = self.marks[0] >= 1 and self.marks[-1] <= len(self.prompt)
        if not bounded or any(a >= b for a, b in pairwise(self.marks)):
            raise ValueError(
                f"marks must rise from 1 or more to {len(self.prompt)} or fewer, got {self.marks}"
            )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and output so far, copied."""
        return (*self.prompt, *self.generated)

    def tokens_between(self, first: int, end: int) -> tuple[int, ...]:
        """Tokens at places first to end - 1 of prompt and output; copies no others."""
        start = len(self.prompt)
        if end <= start:
            return self.prompt[first:end]
        new = self.generated[max(first - start, 0) : max(end - start, 0)]
        return (*self.prompt[first:end], *new)

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def num_remaining_tokens(self) -> int:
        """How many more tokens may be generated."""
        return self.max_tokens - len(self.generated)
