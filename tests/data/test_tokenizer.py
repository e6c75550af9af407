"""Tokenizers: training, loading, the bytes of each token, and cutting long texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sevenfold.config import DataError
from sevenfold.data import load_tokenizer, token_byte_lengths
from sevenfold.data.segments import cut_segments
from sevenfold.data.tokenizer import (
    end_of_text_id,
    require_byte_level,
    sample_texts,
    token_type,
    train_tokenizer,
    vocabulary_size,
)

EOT = "<|endoftext|>"
TEXT = "It is a truth universally acknowledged, that a single man naïve 漢字 12345 !?\n\n" * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], vocab_size=400, end_of_text=EOT)


@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode("utf-8"))


def test_special_tokens_count_no_bytes_and_added_ones_their_own() -> None:
    tokenizer = train_tokenizer([TEXT], vocab_size=300, end_of_text=EOT)
    tokenizer.add_tokens([AddedToken("naïve")])
    lengths = token_byte_lengths(tokenizer)
    assert lengths[tokenizer.token_to_id(EOT)] == 0
    assert lengths[tokenizer.token_to_id("naïve")] == 6
    assert len(lengths) == vocabulary_size(tokenizer) == 301


def test_vocabulary_has_at_most_the_size_asked_for() -> None:
    assert vocabulary_size(train_tokenizer([TEXT], vocab_size=290, end_of_text=EOT)) == 290
    assert vocabulary_size(train_tokenizer(["ab"], vocab_size=290, end_of_text=EOT)) < 290


def test_training_is_deterministic() -> None:
    again = [train_tokenizer([TEXT], vocab_size=350, end_of_text=EOT).to_str() for _ in range(2)]
    assert again[0] == again[1]


def test_token_type_follows_the_largest_id() -> None:
    def words(count: int) -> Tokenizer:
        return Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, "w0"))

    assert token_type(words(2**16)) == "uint16"
    assert token_type(words(2**16 + 1)) == "uint32"


def test_load_takes_a_file_or_a_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    from_folder = load_tokenizer(tmp_path)
    assert from_folder.to_str() == load_tokenizer(tmp_path / "tokenizer.json").to_str()
    assert from_folder.get_vocab() == tokenizer.get_vocab()


def test_unusable_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: tokenizer must be readable, got: No su"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}), encoding="utf-8")
    with pytest.raises(DataError, match=r"must be a tokenizer\.json of `tokenizers`, got"):
        load_tokenizer(tmp_path)


def test_only_byte_level_tokenizers_are_taken(tokenizer: Tokenizer) -> None:
    require_byte_level(tokenizer, "here")
    sequence = Tokenizer(models.BPE())
    sequence.decoder = decoders.Sequence([decoders.ByteLevel()])
    require_byte_level(sequence, "here")
    other = Tokenizer(models.BPE())
    other.decoder = decoders.Metaspace()
    with pytest.raises(DataError, match=r"x: tokenizer must be byte-level, got decoder Metaspace"):
        require_byte_level(other, "x")


def test_end_of_text_must_be_known(tokenizer: Tokenizer) -> None:
    assert end_of_text_id(tokenizer, EOT, "x") == 0
    with pytest.raises(DataError, match=r"got '</s>'; its special tokens: <\|endoftext\|>"):
        end_of_text_id(tokenizer, "</s>", "x")


# Source: the pattern of GPT-4's cl100k_base, https://github.com/openai/tiktoken
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt4": pre_tokenizers.Split(pattern=Regex(GPT4), behavior="isolated"),
}
ODD = ["a", "I'm ", " ", "\n", ".\n", "12", "  x", "é\r\n", "!? "]


@pytest.mark.parametrize("family", SPLITTERS)
@settings(max_examples=60, deadline=None)
@given(odd=st.lists(st.sampled_from(ODD), min_size=20, max_size=60))
def test_segments_split_into_words_as_the_whole_does(family: str, odd: list[str]) -> None:
    splitter = SPLITTERS[family]
    text = "".join(part + "two words" for part in odd)  # so that every stretch has a word start
    segments = list(cut_segments(text, 40))
    whole = [word for word, _ in splitter.pre_tokenize_str(text)]
    parts = [word for part in segments for word, _ in splitter.pre_tokenize_str(part)]
    assert len(segments) > 2
    assert parts == whole


@given(text=st.text(alphabet="ab \n.", max_size=80), size=st.integers(1, 9))
def test_segments_join_to_the_text(text: str, size: int) -> None:
    segments = list(cut_segments(text, size))
    assert "".join(segments) == text
    assert all(size <= len(segment) <= 2 * size for segment in segments[:-1])


def test_sample_is_whole_below_the_cap_and_spread_above_it() -> None:
    texts = [f"{number:03d}" for number in range(100)]
    assert list(sample_texts(texts, total_bytes=300, cap_bytes=300)) == texts
    sample = list(sample_texts(texts, total_bytes=300, cap_bytes=30))
    assert sample[0] == "000"
    assert len(sample) == 10
    assert set(np.diff([int(text) for text in sample]).tolist()) <= {9, 10, 11}
