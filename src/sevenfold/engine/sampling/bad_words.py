"""Words that an output shall not have, as tokens."""

from collections.abc import Sequence

from tokenizers import Tokenizer


def bad_word_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of words, each at a text's beginning and after a space.

    Args:
        tokenizer: the model's.
        words: one character or more each.

    Raises:
        ValueError: a word has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            if not tokens:
                raise ValueError(f"bad_words must have tokens, got {word!r}, which has none")
            found[tokens] = None
    return tuple(found)


def completing_tokens(words: Sequence[Sequence[int]], output: Sequence[int]) -> list[int]:
    """Return the tokens that would complete one of the words behind an output.

    Source: vLLM's bad_words, v1/sample/ops/bad_words.py.
    """
    return [
        word[-1]
        for word in words
        if len(word) <= len(output) + 1
        and tuple(output[len(output) + 1 - len(word) :]) == tuple(word[:-1])
    ]
