"""What a request may ask of the sampler."""

from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sevenfold.config import StrictModel, as_tuple

# Below this, logits over temperature leave the range of fp32.
LEAST_TEMPERATURE = 0.01


def _no_less(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature must be 0 or at least {LEAST_TEMPERATURE}, got {temperature}"
        )
    return temperature


def _texts(value: object) -> object:
    """A text alone is one of them."""
    return (value,) if isinstance(value, str) else as_tuple(value)


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_texts)]
Tokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)]
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_no_less)]
Repetition = Annotated[float, Field(ge=0.01, le=100)]
Probability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingParams(StrictModel):
    """What a request asks of the sampler.

    max_tokens: new tokens at most.
    temperature: divides the logits, from 0.01 to 100; 0 takes the most probable token.
    top_k: only the k most probable tokens; None keeps all.
    top_p: only the most probable tokens that together reach this probability; None keeps all.
    min_p: only tokens with at least this share of the most probable one's probability; None keeps
        all.
    repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens
        that prompt or output already hold, from 0.01 to 100; 1 changes nothing. Source: arXiv
        1909.05858.
    presence_penalty: taken from the logits of tokens that the output already holds.
    frequency_penalty: taken from them once for each time that the output holds them.
    logit_bias: added to the logits of tokens, by their ids.
    bad_words: words that the output shall not have: the last token of a word's tokens is not chosen
        after the others, with and without a space before the word.
    stop: strings that end the output, and are not part of it; here and for bad_words one string,
        a list or a tuple.
    stop_token_ids: tokens that end the output, beside the end-of-sequence token.
    min_tokens: new tokens before one may end the output.
    seed: makes the choice reproducible, whatever else is in the batch; None draws one.
    ignore_eos: go on after the end-of-sequence token.
    logprobs: give the log probability of each new token, and of so many of the most probable ones;
        None gives none. They are the model's own, before any of the rules above.
    prompt_logprobs: the same of each prompt token after the first.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Temperature = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repetition_penalty: Repetition = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Bias] = Field(default_factory=dict)
    bad_words: Texts = ()
    stop: Texts = ()
    stop_token_ids: Tokens = ()
    min_tokens: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        ignored = ("top_k", "top_p", "min_p", "seed")
        for name in ignored:
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be left out at temperature 0, where it has no effect"
                )
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}"
            )
        return self
