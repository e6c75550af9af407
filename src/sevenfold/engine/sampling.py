"""How the next token is chosen: what a request may ask for, and the choice itself."""

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sevenfold.config import StrictModel

Probability = Annotated[float, Field(gt=0, le=1)]


class SamplingParams(StrictModel):
    """What a request asks of the sampler.

    max_tokens: new tokens at most.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: only the k most probable tokens; None keeps all.
    top_p: only the most probable tokens that together reach this probability; None keeps all.
    min_p: only tokens with at least this share of the most probable one's probability; None keeps
        all.
    repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens
        that prompt or output already hold; 1 changes nothing. Source: arXiv 1909.05858.
    stop: strings that end the output, and are not part of it.
    seed: makes the choice reproducible, whatever else is in the batch; None draws one.
    ignore_eos: go on after the end-of-sequence token.
    """

    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        ignored = ("top_k", "top_p", "min_p", "seed")
        for name in ignored:
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be left out at temperature 0, where it has no effect"
                )
        return self


def choose_token(logits: Tensor, seen: Tensor, params: SamplingParams, draw: float) -> int:
    """Choose one sequence's next token.

    The order is penalty, temperature, top_k, top_p, min_p.

    Args:
        logits: [vocab_size] fp32.
        seen: [n] int64, the distinct tokens of prompt and output so far.
        params: what the request asks for.
        draw: uniform in [0, 1); picks by the inverse of the cumulative distribution.

    Returns:
        The token's id.
    """
    logits = _penalised(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = (logits / params.temperature).softmax(-1).sort(descending=True)
    kept = _num_kept(probabilities, params)
    cumulative = probabilities[:kept].double().cumsum(0)
    place = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
    return int(tokens[min(place, kept - 1)])


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    if penalty == 1.0:
        return logits
    chosen = logits[seen]
    penalised = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits.scatter(0, seen, penalised)


def _num_kept(probabilities: Tensor, params: SamplingParams) -> int:
    """How many of the sorted probabilities stay; each rule keeps a prefix of them."""
    kept = len(probabilities)
    if params.top_k is not None:
        kept = min(kept, params.top_k)
    if params.top_p is not None:
        shares = probabilities[:kept] / probabilities[:kept].sum()
        before = shares.cumsum(0) - shares
        kept = int((before < params.top_p).sum())
    if params.min_p is not None:
        least = params.min_p * probabilities[0]
        kept = min(kept, int((probabilities >= least).sum()))
    return max(kept, 1)
