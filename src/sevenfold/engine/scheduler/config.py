"""The limits that a scheduler keeps."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from sevenfold.config import SevenfoldError, StrictModel

_ALL_OUTPUT_TOKENS = 1 << 40

Count = Annotated[int, Field(ge=1)]


class QueueFullError(SevenfoldError, RuntimeError):
    """As many requests wait as may; the caller should come back later (HTTP 429)."""


class SchedulerConfig(StrictModel):
    """The limits that a scheduler keeps.

    max_step_tokens is no less than max_running + max_prefills * min_chunk_tokens, so that no step
    has to choose between decoding and prefill.

    max_request_tokens: what memory holds for one request alone, as the memory plan says; None where
        length costs no memory, in a model of linear layers alone.
    page_tokens: tokens of a KV page; a chunk ends on a page's border or at the prompt's end.
    max_step_tokens: tokens that a step computes at most: chunks, decode rows and their drafts.
    lone_chunk_tokens: what a step without decode rows may compute of the first prompt instead, at
        least max_step_tokens: longer chunks take less time a token, and nobody waits for the next
        one. None gives it no more than others.
    max_running: requests that hold memory at a time, at most.
    max_prefills: those among them whose prompts take more than one step to compute, at most.
    min_chunk_tokens: what each open prompt gets in each step at least; a multiple of page_tokens.
    max_waiting: requests that may wait; one more is refused.
    headroom_tokens: output for which a request must find pages to be opened; doubled by each of its
        preemptions.
    ageing_s: seconds of waiting that weigh as much as one level of priority.
    batch_invariant: what is computed for a request shall not depend on any other. Its prompt is
        computed in chunks that end at multiples of min_chunk_tokens; it is opened when memory has
        room for all of its output, and never preempted.
    """

    max_request_tokens: Count | None
    page_tokens: Count
    max_step_tokens: Count = 8192
    lone_chunk_tokens: Count | None = None
    max_running: Count = 256
    max_prefills: Count = 8
    min_chunk_tokens: Count = 256
    max_waiting: Count = 1024
    headroom_tokens: Annotated[int, Field(ge=0)] = 256
    ageing_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    batch_invariant: bool = False

    @property
    def opening_headroom_tokens(self) -> int:
        """Output for which a request must find pages to be opened at first."""
        return _ALL_OUTPUT_TOKENS if self.batch_invariant else self.headroom_tokens

    @property
    def grain_tokens(self) -> int:
        """A chunk ends at a multiple of these, or at the prompt's end."""
        return self.min_chunk_tokens if self.batch_invariant else self.page_tokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        least = self.max_running + self.max_prefills * self.min_chunk_tokens
        if self.max_step_tokens < least:
            raise ValueError(
                "max_step_tokens must be at least max_running + max_prefills * min_chunk_tokens = "
                f"{self.max_running} + {self.max_prefills} * {self.min_chunk_tokens} = {least}, "
                f"got {self.max_step_tokens}"
            )
        if self.lone_chunk_tokens is not None and self.lone_chunk_tokens < self.max_step_tokens:
            raise ValueError(
                f"lone_chunk_tokens must be at least max_step_tokens = {self.max_step_tokens}, got "
                f"{self.lone_chunk_tokens}"
            )
        if self.min_chunk_tokens % self.page_tokens:
            raise ValueError(
                f"min_chunk_tokens must be a multiple of page_tokens = {self.page_tokens}, "
                f"got {self.min_chunk_tokens}"
            )
        return self
