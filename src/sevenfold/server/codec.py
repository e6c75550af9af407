"""Text to tokens and back, for prompts and for what the API shows of tokens."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from sevenfold.server.errors import bad_request


class Codec:
    """A tokenizer as the server uses it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_context_tokens = max_context_tokens

    def encode(self, text: str, param: str) -> list[int]:
        """Return a text's tokens; param names it in errors."""
        return self.encode_marked(text, (), param)[0]

    def encode_marked(
        self, text: str, places: Sequence[int], param: str
    ) -> tuple[list[int], tuple[int, ...]]:
        """Return a text's tokens, and the token counts that end at places in the text.

        Args:
            text: whole characters.
            places: character counts; for one inside a token, those of the tokens before it.
            param: what the text is called in errors.

        Raises:
            ApiError: the text is not Unicode, or cannot fit whatever its tokens are.
        """
        if len(text) > self.max_context_tokens * self._longest_token:
            raise bad_request(
                f"{param} must fit into the model's context of {self.max_context_tokens} tokens, "
                f"got {len(text)} characters",
                param,
                "context_length_exceeded",
            )
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise bad_request(f"{param} must be valid Unicode text", param) from error
        if not places:
            return encoded.ids, ()
        ends = [end for _, end in encoded.offsets]
        counts = {bisect_right(ends, place) for place in places}
        return encoded.ids, tuple(sorted(counts - {0}))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, incomplete characters included."""
        name = self._tokenizer.id_to_token(token) or ""
        if token in self._special:
            return name.encode()
        if not self._is_byte_level:
            return self._tokenizer.decode([token], skip_special_tokens=False).encode()
        if all(char in _BYTE_OF for char in name):
            return bytes(_BYTE_OF[char] for char in name)
        return name.encode()

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._tokenizer.decoder)

    @cached_property
    def _longest_token(self) -> int:
        # A name in byte-level form has a character a byte, so none is longer than its token's text;
        # 4: normalisers may drop characters before tokens are made, so this bound is generous.
        return 4 * max(map(len, self._tokenizer.get_vocab()), default=1)


def _bytes_of_characters() -> dict[str, int]:
    """Which byte each character of a byte-level tokenizer's vocabulary stands for (GPT-2's map)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    shifted = {chr(256 + n): byte for n, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in shown} | shifted


_BYTE_OF = _bytes_of_characters()
