"""The choice of tokens by what each request asks for, on the device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sevenfold.engine.ahead import Chosen
from sevenfold.engine.constraint import mask_logits
from sevenfold.engine.request import Request
from sevenfold.engine.sampling import Output, Sampler, read_logprobs
from sevenfold.engine.transfer import Arriving
from sevenfold.engine.underway import Underway


class Choosing:
    """Chooses tokens of requests under way, and keeps the sampler from step to step."""

    def __init__(
        self, underway: Mapping[str, Underway], vocab_size: int, device: torch.device
    ) -> None:
        self._underway, self._where = underway, (vocab_size, device)
        self._kept: tuple[tuple[Request, ...], Sampler] | None = None

    def choose(
        self,
        requests: Sequence[Request | None],
        logits: Tensor,
        sampler: Sampler,
        best: Tensor | None = None,
    ) -> Chosen:
        """Choose a token of each row, whose best may be known; those of None are nobody's."""
        underway = [None if r is None else self._underway[r.id] for r in requests]
        constraints = [None if one is None else one.constraint for one in underway]
        checked = sampler.choose_checked(mask_logits(logits, constraints), logits, best)
        tokens, arriving = checked[:, 0], Arriving(checked)
        asked = [None if one is None else one.output.params.logprobs for one in underway]
        logprobs = read_logprobs(logits, tokens, asked)
        return Chosen(tuple(requests), sampler, tokens, arriving, logprobs)

    def kept_sampler(self, requests: Sequence[Request]) -> Sampler:
        """Return the sampler of the step before, if it served the same requests."""
        served = tuple(requests)
        if self._kept is None or self._kept[0] != served:
            self._kept = (served, self.new_sampler(requests))
        return self._kept[1]

    def forget(self) -> None:
        """Keep no sampler: outputs have gone on without it."""
        self._kept = None

    def new_sampler(self, requests: Sequence[Request]) -> Sampler:
        """Return a sampler of requests, by the tokens of theirs that are recorded."""
        return self.sampler_of([self._underway[request.id].output for request in requests])

    def sampler_of(self, outputs: Sequence[Output]) -> Sampler:
        """Return a sampler of outputs."""
        return Sampler(outputs, *self._where)
