"""Text as it comes equals text at once, and a stop string is never seen."""

import pytest
from engine_helpers import EOS, VOCAB_SIZE, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sevenfold.engine import TextStream

TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=24)
# Two letters, so that stop strings and their beginnings come up all the time.
LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)

# GPT-2's alphabet: printable bytes stand for themselves, the others from U+0100 up.
OWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in OWN]
LETTER_OF = {byte: chr(byte) for byte in OWN}
LETTER_OF |= {byte: chr(0x100 + place) for place, byte in enumerate(OTHERS)}


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte, whatever the bytes are."""
    return [tokenizer.token_to_id(LETTER_OF[byte]) for byte in data]


def streamed(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The parts that are shown: one a token until a stop string, and the rest."""
    stream, parts = TextStream(tokenizer, stop), []
    for token in tokens:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    parts.append(stream.finish())
    assert stream.text == "".join(parts)
    assert stream.finish() == ""
    return parts


@settings(max_examples=300, deadline=None)
@given(tokens=TOKENS)
def test_joined_parts_are_the_decoded_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12))
def test_any_bytes_one_by_one(tokenizer: Tokenizer, data: bytes) -> None:
    tokens = byte_tokens(tokenizer, data)
    expected = data.decode("utf-8", errors="replace")
    assert tokenizer.decode(tokens) == expected
    assert "".join(streamed(tokenizer, tokens)) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=8))
def test_characters_come_whole(tokenizer: Tokenizer, text: str) -> None:
    """Byte by byte, each character comes with its last byte, U+FFFD itself with the next."""
    tokens = byte_tokens(tokenizer, text.encode())
    parts = streamed(tokenizer, tokens)
    assert "".join(parts) == text
    if "\ufffd" not in text:
        ends = [c if last else "" for c in text for last in _is_last(c)]
        assert parts == [*ends, ""]


def _is_last(character: str) -> list[bool]:
    return [i == len(character.encode()) - 1 for i in range(len(character.encode()))]


def test_an_incomplete_end_comes_with_finish(tokenizer: Tokenizer) -> None:
    tokens = byte_tokens(tokenizer, "é€".encode()[:-1])
    assert streamed(tokenizer, tokens) == ["", "é", "", "", "\ufffd"]


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    eos = tokenizer.token_to_id(EOS)
    tokens = [eos, *encode(tokenizer, "the"), eos, *encode(tokenizer, " old"), eos]
    assert "".join(streamed(tokenizer, tokens)) == "the old"


def stopped_text(pieces: list[str], stop: tuple[str, ...]) -> str:
    """What is left of the text when the first token that completes a stop string has come."""
    text = ""
    for piece in pieces:
        text += piece
        places = [at for at in range(len(text)) if text.startswith(stop, at)]
        if stop and places:
            return text[: places[0]]
    return text


@settings(max_examples=300, deadline=None)
@given(text=LETTERS, stop=STOPS)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> None:
    """A byte a token; stop strings lie over any number of them."""
    tokens = byte_tokens(tokenizer, text.encode())
    expected = stopped_text(list(text), stop)
    parts = streamed(tokenizer, tokens, stop)
    assert "".join(parts) == expected
    shown = ""
    for part, end in zip(parts[:-1], range(1, len(parts)), strict=True):
        shown += part
        assert expected.startswith(shown)
        # What is held back begins a stop string: never more, so text comes as soon as it may.
        held = text[len(shown) : end]
        assert held == "" or any(one.startswith(held) for one in stop)


def test_a_token_with_two_stop_strings_is_cut_at_the_first(tokenizer: Tokenizer) -> None:
    token = tokenizer.token_to_id("Ġstood")
    stream = TextStream(tokenizer, ("od", "to", "d"))
    assert stream.push(token) == " s"
    assert (stream.stopped, stream.text, stream.finish()) == (True, " s", "")


def test_what_may_become_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    tokens = byte_tokens(tokenizer, b"xEND? EN")
    assert streamed(tokenizer, tokens, ("END!",)) == ["x", "", "", "", "END?", " ", "", "", "EN"]
    tokens = byte_tokens(tokenizer, b"xEND!y")
    assert streamed(tokenizer, tokens, ("END!",)) == ["x", "", "", "", "", ""]


def test_a_stop_string_of_several_bytes(tokenizer: Tokenizer) -> None:
    tokens = byte_tokens(tokenizer, "aé€b".encode())
    assert "".join(streamed(tokenizer, tokens, ("€",))) == "aé"
    assert "".join(streamed(tokenizer, tokens, ("é€",))) == "a"


def test_a_stop_string_that_only_finish_completes(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("\ufffd",))
    assert [stream.push(token) for token in byte_tokens(tokenizer, b"a\xe2\x82")] == ["a", "", ""]
    assert not stream.stopped
    assert stream.finish() == ""
    assert (stream.stopped, stream.text) == (True, "a")


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_nothing_in_nothing_out(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    assert streamed(tokenizer, [], stop) == [""]
