"""What sf.LLM gives back: whole completions, and what each token adds to one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sevenfold.engine.events import TokenEvent
from sevenfold.engine.grammar import GrammarConstraint
from sevenfold.engine.request import Request, RequestFailedError
from sevenfold.engine.request_options import RequestOptions
from sevenfold.engine.sampling import Logprobs, SamplingParams


@dataclass(frozen=True)
class Completion:
    """One prompt's output; finish_reason is "stop" for a token or string that ends it.

    logprobs: one entry for each token, if they were asked for.
    prompt_logprobs: one entry for each prompt token after the first, if they were asked for.
    cached_tokens: of the prompt, found in the prefix cache.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[Logprobs, ...] | None
    prompt_logprobs: tuple[Logprobs, ...] | None
    cached_tokens: int


@dataclass(frozen=True)
class Delta:
    """What one token added to an output; finish_reason is None until its last delta.

    cached_tokens: of the prompt, found in the prefix cache.
    prompt_logprobs: with the first delta, if they were asked for.
    """

    text: str
    token_id: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: Logprobs | None
    prompt_logprobs: tuple[Logprobs, ...] | None
    cached_tokens: int


@dataclass
class LLMOutput:
    """One output, before and while it is generated."""

    request: Request
    params: SamplingParams
    constraint: GrammarConstraint | None
    options: RequestOptions

    def delta(self, event: TokenEvent) -> Delta:
        """What an event gave.

        Raises:
            RequestFailedError: the output ended without coming to its end.
        """
        if event.finish_reason == "deadline":
            raise RequestFailedError(
                f"the output must end within its deadline of {self.options.deadline_s:g} s, and "
                "did not"
            )
        if event.token_id is None:
            raise RequestFailedError(event.error or f"the output ended: {event.finish_reason}")
        reason = event.finish_reason and ("stop" if event.finish_reason == "stop" else "length")
        return Delta(
            text=event.text,
            token_id=event.token_id,
            finish_reason=reason,
            logprobs=event.logprobs,
            prompt_logprobs=event.prompt_logprobs,
            cached_tokens=self.request.num_cached_tokens,
        )


def join_deltas(prompt: tuple[int, ...], deltas: Sequence[Delta]) -> Completion:
    """Return the completion that a prompt's deltas add up to; there is one or more."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return Completion(
        prompt_token_ids=prompt,
        token_ids=tuple(delta.token_id for delta in deltas),
        text="".join(delta.text for delta in deltas),
        finish_reason=deltas[-1].finish_reason or "length",
        logprobs=tuple(logprobs) if logprobs else None,
        prompt_logprobs=deltas[0].prompt_logprobs,
        cached_tokens=deltas[-1].cached_tokens,
    )
