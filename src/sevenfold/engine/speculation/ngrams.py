"""Where a text has gone on from what it ends with."""

from collections.abc import Iterator, Sequence

from sevenfold.engine.speculation.config import PromptLookupConfig


class NgramIndex:
    """Places of a growing text by the min_match_tokens tokens before them.

    A place is the number of tokens before it. Those that share their n-gram are chained, the latest
    first: a token costs one entry of a dictionary and one of a list.
    """

    def __init__(self, config: PromptLookupConfig) -> None:
        self._config = config
        self._text: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int | None] = []

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the text's end."""
        n = self._config.min_match_tokens
        for token in tokens:
            self._text.append(token)
            key = tuple(self._text[-n:])
            self._earlier.append(self._latest.get(key))
            # Shorter than an n-gram only at the very beginning, where it matches nothing later.
            self._latest[key] = len(self._text)

    def continuations(self, num_tokens: int, num_branches: int) -> list[list[int]]:
        """Return what followed the longest matches with the text's end, the latest first of equals.

        Args:
            num_tokens: length of each; one that reaches the text's end goes on from its beginning,
                as a text does that repeats itself.
            num_branches: how many that differ from the first token on, at most.
        """
        found: dict[int, list[int]] = {}
        for place in sorted(self._places(), key=self._match_tokens, reverse=True):
            if len(found) == num_branches:
                break
            if self._text[place] not in found:
                found[self._text[place]] = self._copied(place, num_tokens)
        return list(found.values())

    def _places(self) -> Iterator[int]:
        """The latest places with the n-gram of the text's end, itself apart."""
        if len(self._text) < self._config.min_match_tokens:
            return
        place = self._earlier[-1]
        for _ in range(self._config.max_places):
            if place is None:
                return
            yield place
            place = self._earlier[place - 1]

    def _match_tokens(self, place: int) -> int:
        """How many tokens before a place are those before the text's end."""
        most = min(self._config.max_match_tokens, place)
        for length in range(self._config.min_match_tokens, most):
            if self._text[place - 1 - length] != self._text[-1 - length]:
                return length
        return most

    def _copied(self, place: int, num_tokens: int) -> list[int]:
        period = len(self._text) - place
        return [self._text[place + i % period] for i in range(num_tokens)]
