"""Cutting long documents into segments that tokenize as the whole does."""

import re
from collections.abc import Iterator

SEGMENT_CHARACTERS = 1 << 16

# A letter, then one space or line feed, then a letter: GPT-2's pre-tokenizer and the GPT-4 family
# both begin a new word at that whitespace, so a cut before it changes no token.
_WORD_START = re.compile(r"(?<=[^\W\d_])(?=[ \n][^\W\d_])")


def cut_segments(text: str, size_characters: int = SEGMENT_CHARACTERS) -> Iterator[str]:
    """Cut a text into segments of one to two times `size_characters`; joined, they are the text.

    A stretch of that length without two words side by side is cut at its end; a tokenizer may
    then give one word there other tokens than in the whole text, still of the same bytes.

    Args:
        text: what to cut; an empty text gives one empty segment.
        size_characters: where to begin looking for a cut.

    Yields:
        The segments, in order.
    """
    start = 0
    while len(text) - start > 2 * size_characters:
        match = _WORD_START.search(text, start + size_characters, start + 2 * size_characters)
        end = match.start() if match else start + 2 * size_characters
        yield text[start:end]
        start = end
    yield text[start:]
