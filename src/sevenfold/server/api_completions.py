"""Requests and answers of /v1/completions."""

from typing import Annotated, Literal

from pydantic import Field

from sevenfold.server.api_common import (
    MAX_CACHE_MARKS,
    MAX_LOGPROBS,
    ApiAnswer,
    SamplingFields,
    Token,
    Usage,
)

Tokens = Annotated[list[Token], Field(min_length=1)]
Mark = Annotated[int, Field(ge=1)]


class CompletionRequest(SamplingFields):
    """Prompts to go on from: one or several, each as text or as tokens."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Tokens], Field(min_length=1)]
    )
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    cache_marks: Annotated[list[Mark], Field(max_length=MAX_CACHE_MARKS)] | None = Field(
        None, description="rising token counts up to which other requests share the prompts"
    )
    best_of: Literal[1] | None = None
    suffix: None = None


class CompletionLogprobs(ApiAnswer):
    """Log probabilities of an output's tokens; with echo, of the prompt's too."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ApiAnswer):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(ApiAnswer):
    """The outputs of a request; prompt by prompt, n for each."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
