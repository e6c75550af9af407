"""From tokens to text as they come: whole characters only, and never past a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Decodes one output token by token.

    A character whose bytes are not complete is held back until they are, and so is text that may
    become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._text = ""
        self._given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, cut before the stop string."""
        return self._text

    def push(self, token: int) -> str:
        """Add a token, and return the text that may be shown now."""
        self._tokens.append(token)
        self._text += self._stream.step(self._tokenizer, token) or ""
        if not self._stop:
            return self._give(len(self._text))
        self._cut_at_stop()
        return self._give(len(self._text) if self.stopped else self._safe_length())

    def finish(self) -> str:
        """Return the text held back, at the end of the output."""
        if not self.stopped:
            self._text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            self._cut_at_stop()
        return self._give(len(self._text))

    def _cut_at_stop(self) -> None:
        found = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _safe_length(self) -> int:
        """Up to the longest end of the text that a stop string begins with."""
        held = 0
        for stop in self._stop:
            for length in range(1, len(stop)):
                if self._text.endswith(stop[:length]):
                    held = max(held, length)
        return len(self._text) - held

    def _give(self, until: int) -> str:
        part = self._text[self._given : until]
        self._given = max(self._given, until)
        return part
