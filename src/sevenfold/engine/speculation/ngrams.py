"""Where a text has gone on from what it ends with."""

from collections.abc import Sequence

from sevenfold.engine.speculation.config import PromptLookupConfig

_ID_BITS = 32


class NgramIndex:
    """Places of a growing text by the min_match_tokens tokens before them.

    A place is the number of tokens before it. Those that share their n-gram are chained, the latest
    first: a token costs one entry of a dictionary and one of a list.
    """

    def __init__(self, config: PromptLookupConfig) -> None:
        self._config = config
        self._text: list[int] = []
        # An n-gram is one integer, its ids side by side: as a tuple each token would be one more
        # thing to the garbage collector. Before the text stands the id 2**32 - 1, which none has.
        self._mask = (1 << _ID_BITS * config.min_match_tokens) - 1
        self._end = self._mask
        self._latest: dict[int, int] = {}
        self._earlier: list[int | None] = []

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the text's end."""
        end, mask, latest = self._end, self._mask, self._latest
        for place, token in enumerate(map(int, tokens), start=len(self._text) + 1):
            end = (end << _ID_BITS | token) & mask
            self._earlier.append(latest.get(end))
            latest[end] = place
        self._end = end
        self._text.extend(tokens)

    def continuations(self, num_tokens: int, num_branches: int) -> list[list[int]]:
        """Return what followed the longest matches with the text's end, the latest first of equals.

        Args:
            num_tokens: length of each; one that reaches the text's end goes on from its beginning,
                as a text does that repeats itself.
            num_branches: how many that differ from the first token on, at most.
        """
        found: dict[int, list[int]] = {}
        places = self._places()
        if len(places) > 1:
            places.sort(key=self._match_tokens, reverse=True)
        for place in places:
            if len(found) == num_branches:
                break
            if self._text[place] not in found:
                found[self._text[place]] = self._copied(place, num_tokens)
        return list(found.values())

    def _places(self) -> list[int]:
        """The latest places with the n-gram of the text's end, itself apart."""
        found: list[int] = []
        place = self._earlier[-1] if self._earlier else None
        while place is not None and len(found) < self._config.max_places:
            found.append(place)
            place = self._earlier[place - 1]
        return found

    def _match_tokens(self, place: int) -> int:
        """How many tokens before a place are those before the text's end."""
        most = min(self._config.max_match_tokens, place)
        for length in range(self._config.min_match_tokens, most):
            if self._text[place - 1 - length] != self._text[-1 - length]:
                return length
        return most

    def _copied(self, place: int, num_tokens: int) -> list[int]:
        copied = self._text[place : place + num_tokens]
        return (copied * -(-num_tokens // max(1, len(copied))))[:num_tokens]
