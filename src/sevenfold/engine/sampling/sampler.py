"""The sampler of a batch: rules, penalties and random numbers of each request together."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.sampling.bad_words import completing_tokens
from sevenfold.engine.sampling.draws import uniform
from sevenfold.engine.sampling.params import SamplingParams
from sevenfold.engine.sampling.penalties import Penalties
from sevenfold.engine.sampling.rules import build_rules, choose_tokens
from sevenfold.engine.transfer import side_by_side, upload_parts
from sevenfold.ops import are_finite, greedy_tokens


@dataclass
class Output:
    """What the sampler must know of one request: what it asks, and its tokens so far.

    end_ids: tokens that would end it, which min_tokens holds back.
    bad_words: token sequences that it shall not have.
    """

    params: SamplingParams
    prompt: Sequence[int]
    end_ids: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    bad_words: Sequence[Sequence[int]] = ()

    @cached_property
    def seed(self) -> int:
        """The request's own, or one that is drawn when it is first asked for."""
        return secrets.randbits(64) if self.params.seed is None else self.params.seed


class Sampler:
    """Chooses the next token of N requests; build a new one when they change."""

    def __init__(self, outputs: Sequence[Output], vocab_size: int, device: torch.device) -> None:
        params = [output.params for output in outputs]
        prompts, tokens = ([getattr(o, name) for o in outputs] for name in ("prompt", "tokens"))
        # Most outputs forbid nothing, and are not asked again at each token.
        self._strict = [(n, o) for n, o in enumerate(outputs) if o.bad_words or o.params.min_tokens]
        self._penalties = Penalties(params, prompts, tokens, vocab_size, device)
        self._num_followed = 0
        # Nothing is sent for requests that draw nothing.
        self._rules = None
        if any(p.temperature > 0 for p in params):
            self._rules = build_rules(params, vocab_size, device)
            seeds = [o.seed - (1 << 64) if o.seed >= 1 << 63 else o.seed for o in outputs]
            draws = [np.array(numbers) for numbers in (seeds, [len(t) for t in tokens])]
            self._seeds, self._places = upload_parts(draws, device)

    def choose(self, logits: Tensor) -> Tensor:
        """Choose each request's next token, [N] int64, from logits [N, vocab_size] fp32.

        The caller appends it to the outputs; nothing here waits for the device.
        """
        return self._chosen(self._without(self._penalties.apply(logits)))

    def choose_checked(
        self, logits: Tensor, computed: Tensor, best: Tensor | None = None
    ) -> Tensor:
        """Choose as `choose` does, and tell which rows of `computed` are finite.

        Args:
            logits: [N, vocab_size] fp32.
            computed: [N, vocab_size], what the model gave: logits, before some were forbidden.
            best: [N, 2] int64, what this gives of `computed` where all are greedy, if it is known.

        Returns:
            [N, 2] int64: token ids, and 1 where a row of `computed` is finite.
        """
        logits = self._without(self._penalties.apply(logits))
        if logits is not computed or self._rules is not None:
            return side_by_side([self._chosen(logits), are_finite(computed)])
        checked = side_by_side(greedy_tokens(logits)) if best is None else best
        self.follow(checked[:, 0])
        return checked

    def _chosen(self, logits: Tensor) -> Tensor:
        if self._rules is None:
            tokens = logits.argmax(-1)
        else:
            places = self._places + self._num_followed
            tokens = choose_tokens(logits, self._rules, uniform(self._seeds, places))
        self.follow(tokens)
        return tokens

    def follow(self, tokens: Tensor) -> None:
        """Take each output one token further, [N] int64, before the host knows these tokens."""
        self._penalties.record(tokens)
        self._num_followed += 1

    def _without(self, logits: Tensor) -> Tensor:
        """Forbid ends that come too early, and what would complete a bad word."""
        forbidden = [(n, token) for n, o in self._strict for token in _forbidden(o)]
        if not forbidden:
            return logits
        rows, tokens = torch.tensor(forbidden, device=logits.device).T
        return logits.index_put((rows, tokens), logits.new_tensor(-math.inf))


def _forbidden(output: Output) -> list[int]:
    """Tokens that an output must not have next."""
    early = len(output.tokens) < output.params.min_tokens
    ends = list(output.end_ids) if early else []
    return ends + completing_tokens(output.bad_words, output.tokens)
