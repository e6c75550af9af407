"""Drafts copied from the request's own prompt and output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sevenfold.engine.request import Request
from sevenfold.engine.speculation.config import PromptLookupConfig
from sevenfold.engine.speculation.drafter import Ask, Paths
from sevenfold.engine.speculation.ngrams import NgramIndex

# Of a prompt, in a step that decodes: 0.05 to 0.2 ms.
MAX_INDEXED_TOKENS = 256


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

    def read(self, request: Request, num_tokens: int) -> None:
        """Add so many tokens more of a prompt to its index."""
        self._extended(request, num_tokens)

    def propose(self, asks: Sequence[Ask]) -> list[Paths]:
        """Return what followed the longest matches of each request's last tokens."""
        return [self._continuations(ask) for ask in asks]

    def forget(self, request_id: str) -> None:
        """Drop a request's index."""
        self._indexed.pop(request_id, None)

    def _continuations(self, ask: Ask) -> Paths:
        indexed = self._extended(ask.request, MAX_INDEXED_TOKENS)
        if indexed.num_tokens < ask.request.num_tokens:
            return []
        return indexed.index.continuations(ask.num_tokens, ask.num_branches)

    def _extended(self, request: Request, most: int) -> _Indexed:
        """The request's index, with more of its prompt, and then with all of its output."""
        indexed, num_prompt = self._indexed.get(request.id), len(request.prompt)
        if indexed is None:
            first = max(0, num_prompt - self._config.history_tokens)
            indexed = self._indexed[request.id] = _Indexed(NgramIndex(self._config), first)
        known = indexed.num_tokens
        indexed.index.extend(request.prompt[known : known + most])
        if indexed.num_tokens >= num_prompt:
            indexed.index.extend(request.generated[indexed.num_tokens - num_prompt :])
        return indexed
