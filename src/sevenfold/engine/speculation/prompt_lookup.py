"""Drafts copied from the request's own prompt and output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sevenfold.engine.request import Request
from sevenfold.engine.speculation.config import PromptLookupConfig
from sevenfold.engine.speculation.drafter import Ask, Paths
from sevenfold.engine.speculation.ngrams import NgramIndex

# Of all prompts in a step, beside those that the step computes: 0.6 ms.
MOST_READ_TOKENS = 2048


@dataclass
class _Indexed:
    """A request's last tokens: those from number `first` on, as many as the index has."""

    index: NgramIndex
    first: int

    @property
    def num_tokens(self) -> int:
        return self.first + len(self.index)


class PromptLookup:
    """Guesses that a text goes on as it did the last time that it had this end.

    Source: A. Saxena, "Prompt lookup decoding", 2023.
    """

    is_free = True

    def __init__(self, config: PromptLookupConfig) -> None:
        self._config = config
        self._indexed: dict[str, _Indexed] = {}

    def warm_up(self, stopped: Callable[[], bool]) -> None:
        """Nothing: it runs no model."""

    def read(self, requests: Sequence[Request], num_computed: int) -> None:
        """Add more of prompts to their indices, of the first requests first."""
        left = num_computed + MOST_READ_TOKENS
        for request in requests:
            if left <= 0:
                return
            known = len(self._of(request).index)
            left -= len(self._extended(request, left).index) - known

    def propose(self, asks: Sequence[Ask]) -> list[Paths]:
        """Return what followed the longest matches of each request's last tokens."""
        return [self._continuations(ask) for ask in asks]

    def forget(self, request_id: str) -> None:
        """Drop a request's index."""
        self._indexed.pop(request_id, None)

    def _continuations(self, ask: Ask) -> Paths:
        indexed = self._extended(ask.request, 0)
        if indexed.num_tokens < ask.request.num_tokens:
            return []
        return indexed.index.continuations(ask.num_tokens, ask.num_branches)

    def _extended(self, request: Request, most: int) -> _Indexed:
        """The request's index, with more of its prompt, and then with all of its output."""
        indexed, num_prompt = self._of(request), len(request.prompt)
        known = indexed.num_tokens
        if known < num_prompt:
            indexed.index.extend(request.prompt[known : known + most])
        if indexed.num_tokens >= num_prompt:
            indexed.index.extend(request.generated[indexed.num_tokens - num_prompt :])
        return indexed

    def _of(self, request: Request) -> _Indexed:
        if request.id not in self._indexed:
            first = max(0, len(request.prompt) - self._config.history_tokens)
            self._indexed[request.id] = _Indexed(NgramIndex(self._config), first)
        return self._indexed[request.id]
