"""What a step of the engine gives."""

from typing import NamedTuple

from sevenfold.engine.cache import Lookup
from sevenfold.engine.request import FinishReason
from sevenfold.engine.sampling import Logprobs


class TokenEvent(NamedTuple):
    """What a step gave to one request.

    token_id: the new token; None where the request ended without one.
    text: what it completed.
    finish_reason: None until the request's last event.
    logprobs: if they were asked for.
    prompt: what was found in the prefix cache; comes with the first token.
    prompt_logprobs: one entry for each prompt token but the first, if they were asked for;
        they come with the first token.
    error: what went wrong, where finish_reason is "error".
    """

    request_id: str
    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None
    prompt: Lookup | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    error: str | None = None
