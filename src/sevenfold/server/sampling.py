"""From what a request's body says to what the engine is asked."""

from typing import Any

from sevenfold.config import ConfigError, parse_config
from sevenfold.engine import SamplingParams
from sevenfold.server.api_common import SamplingFields
from sevenfold.server.codec import Codec
from sevenfold.server.errors import bad_request

_SAME = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
)


def sampling_params(
    body: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    stop: tuple[str, ...],
    codec: Codec,
) -> SamplingParams:
    """Return what a body asks of the sampler.

    At temperature 0, where top_k, top_p, min_p and seed change nothing, clients send them all the
    same, and they are left out.

    Args:
        body: the request.
        max_tokens: new tokens at most.
        logprobs: of how many tokens a place, beside the chosen one's; None for none.
        prompt_logprobs: the same of the prompt's own tokens.
        stop: strings beside the body's own.
        codec: knows which tokens there are.

    Raises:
        ApiError: a value breaks a rule.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    values |= {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "bad_words": tuple(body.bad_words or ()),
        "stop": (*_stops(body), *stop),
        "stop_token_ids": _known(body.stop_token_ids or [], "stop_token_ids", codec),
        "logit_bias": _biases(body, codec),
    }
    if temperature > 0:
        values |= {
            "top_k": None if body.top_k in (0, -1) else body.top_k,
            "top_p": None if body.top_p == 1 else body.top_p,
            "min_p": body.min_p or None,
            # OpenAI's seeds are signed.
            "seed": None if body.seed is None else body.seed % 2**64,
        }
    values = {name: value for name, value in values.items() if value is not None}
    try:
        return parse_config(SamplingParams, values, "request")
    except ConfigError as error:
        raise bad_request(str(error).removeprefix("request: ")) from error


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Return the params of one of n outputs: the seed of output i is seed + i."""
    if params.seed is None or index == 0:
        return params
    return params.model_copy(update={"seed": (params.seed + index) % 2**64})


def _stops(body: SamplingFields) -> list[str]:
    if body.stop is None:
        return []
    return [body.stop] if isinstance(body.stop, str) else body.stop


def _biases(body: SamplingFields, codec: Codec) -> dict[int, float]:
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    _known(list(biases), "logit_bias", codec)
    return biases


def _known(tokens: list[int], name: str, codec: Codec) -> list[int]:
    beyond = [token for token in tokens if token >= codec.vocab_size]
    if beyond:
        raise bad_request(
            f"{name} must name tokens below {codec.vocab_size}, got {beyond[0]}", name
        )
    return tokens
