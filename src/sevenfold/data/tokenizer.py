"""Byte-level BPE tokenizers: train, load, check, and count the bytes of each token."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sevenfold.config import DataError
from sevenfold.data.segments import cut_segments

TOKENIZER_FILE = "tokenizer.json"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, end_of_text: str) -> Tokenizer:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenizer and one special token.

    Args:
        texts: the sample; only its distinct words are held in memory.
        vocab_size: most tokens; a small sample may give fewer.
        end_of_text: the special token; its id is 0.

    Returns:
        The tokenizer; it gives every text back byte for byte.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def sample_texts(texts: Iterable[str], *, total_bytes: int, cap_bytes: int) -> Iterator[str]:
    """Yield an evenly spread share of a stream of texts, at most `cap_bytes` and one segment.

    Args:
        texts: the stream.
        total_bytes: UTF-8 bytes of the whole stream.
        cap_bytes: bytes wanted; the whole stream comes when it is no larger.
    """
    share = min(1.0, cap_bytes / total_bytes)
    credit = 1.0  # one credit buys one segment, so the first segment always comes
    taken = 0
    for text in texts:
        for segment in cut_segments(text):
            if taken >= cap_bytes:
                return
            if credit >= 1.0:
                credit -= 1.0
                taken += len(segment.encode("utf-8"))
                yield segment
            credit += share


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a `tokenizer.json`, or a folder that holds one.

    Raises:
        DataError: the file is missing or is no tokenizer.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        return Tokenizer.from_buffer(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: tokenizer must be readable, got: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} must be a tokenizer.json of `tokenizers`, got: {error}") from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` into a folder."""
    (folder / TOKENIZER_FILE).write_bytes(_serialise(tokenizer))


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the file that save_tokenizer writes."""
    return hashlib.sha256(_serialise(tokenizer)).hexdigest()


def require_byte_level(tokenizer: Tokenizer, place: str) -> None:
    """Raise if a tokenizer does not work on bytes, as the count of bits per byte needs.

    Raises:
        DataError: its decoder is not, and does not contain, ByteLevel.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
    if "ByteLevel" not in kinds:
        raise DataError(
            f"{place}: tokenizer must be byte-level, got decoder {', '.join(kinds) or None}; "
            f"leave tokenizer out to train one"
        )


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many UTF-8 bytes of text each token stands for.

    Args:
        tokenizer: a byte-level tokenizer.

    Returns:
        [vocab_size] int32; 0 for special tokens and for ids without a token.
    """
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)  # [vocab_size]
    for token, number in vocabulary.items():
        # A byte-level token is spelt with one character for each byte.
        lengths[number] = len(token)
    for number, token in added.items():
        lengths[number] = 0 if token.special else len(token.content.encode("utf-8"))
    return lengths


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the largest token id plus one: the rows that an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_type(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    """Return the smallest unsigned type that holds every token id."""
    return "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"


def end_of_text_id(tokenizer: Tokenizer, token: str, place: str) -> int:
    """Return the id of the end-of-text token.

    Raises:
        DataError: the tokenizer has no such token.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        raise DataError(
            f"{place}: end_of_text must be a token of the tokenizer, got {token!r}; "
            f"its special tokens: {', '.join(special) or 'none'}"
        )
    return number


def _serialise(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str(pretty=True).encode("utf-8")
