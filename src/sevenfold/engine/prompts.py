"""Prompts as callers give them, and the token ids that the engine computes."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

Prompt = str | Sequence[int]


def prompt_list(prompts: str | Iterable[Prompt]) -> list[Prompt]:
    """Return prompts one by one; a text is one prompt, not a prompt for each of its characters.

    Raises:
        TypeError: they are no prompts, or the token ids of one.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts must be a text, or a list of texts and of lists of token ids, got {prompts!r}"
        )
    found = list(prompts)
    if found and isinstance(found[0], Integral):
        raise TypeError(
            f"prompts must hold texts and lists of token ids, got {found[0]!r}; token ids of one "
            "prompt are a list in this list"
        )
    return found


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Return a prompt's token ids, each of which the model has.

    Args:
        prompt: a text, or integers in [0, vocab_size); of a text no special tokens are added.
        tokenizer: the model's.
        vocab_size: how many tokens the model has.

    Raises:
        TypeError: it is neither text nor integers.
        ValueError: it is empty, or a token is not in the vocabulary.
    """
    ids = _encoded(prompt, tokenizer) if isinstance(prompt, str) else _integers(prompt)
    if not ids:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(
            f"prompt must hold tokens from 0 to below vocab_size = {vocab_size}, got "
            f"{min(ids)} to {max(ids)}"
        )
    return ids


def _encoded(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)
    except TypeError as error:  # what tokenizers makes of half a surrogate pair
        raise ValueError(f"prompt must be valid Unicode text, got {text[:80]!r}") from error


def _integers(prompt: Sequence[int]) -> tuple[int, ...]:
    values = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt
    if isinstance(values, bytes) or not isinstance(values, Sequence):
        raise TypeError(f"prompt must be a text or a list of token ids, got {prompt!r}")
    if set(map(type, values)) <= {int}:  # as fast as a prompt of a million tokens needs it
        return tuple(values)
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(
                f"prompt must hold token ids, which are integers, got {value!r} at place {place}"
            )
    return tuple(int(value) for value in values)
