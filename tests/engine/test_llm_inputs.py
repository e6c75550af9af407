"""What callers may hand to sf.LLM: wrong inputs are refused, by name, and hurt nobody else."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer

from sevenfold.engine import LLM, Grammar, SamplingParams, TextModel

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
GOOD = (3, 1, 4)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> LLM:
    return LLM(TextModel(tiny_model(), tokenizer), memory_bytes=1 << 22)


def among_others(
    llm: LLM, prompt: Any, params: SamplingParams = GREEDY, **asked: Any
) -> tuple[int, ...] | BaseException:
    """One output's tokens, or its error, while two neighbours get what they get alone."""

    async def tokens(prompt: Any, params: SamplingParams, **asked: Any) -> tuple[int, ...]:
        deltas = llm.stream_async(prompt, params, **asked)
        return tuple([delta.token_id async for delta in deltas])

    async def all_of_them() -> list[tuple[int, ...] | BaseException]:
        runs = (tokens(GOOD, GREEDY), tokens(prompt, params, **asked), tokens(GOOD, GREEDY))
        return await asyncio.gather(*runs, return_exceptions=True)

    before, found, behind = asyncio.run(all_of_them())
    [alone] = llm.generate([GOOD], GREEDY)
    assert before == behind == alone.token_ids
    return found


@pytest.mark.parametrize(
    ("prompt", "error", "rule"),
    [
        ([1.5], TypeError, "token ids, which are integers, got 1.5 at place 0"),
        ([2, True], TypeError, "token ids, which are integers, got True at place 1"),
        ([np.True_], TypeError, r"token ids, which are integers, got np.True_ at place 0"),
        (np.array([1.0]), TypeError, "token ids, which are integers, got 1.0 at place 0"),
        (torch.tensor([True]), TypeError, "token ids, which are integers, got True at place 0"),
        ([[1]], TypeError, r"token ids, which are integers, got \[1\] at place 0"),
        (["a"], TypeError, "token ids, which are integers, got 'a' at place 0"),
        ([None], TypeError, "token ids, which are integers, got None at place 0"),
        (None, TypeError, "prompt must be a text or a list of token ids, got None"),
        (b"ab", TypeError, "prompt must be a text or a list of token ids, got b'ab'"),
        ([], ValueError, r"prompt must have at least one token, got \[\]"),
        ([-1], ValueError, "prompt must hold tokens from 0 to below vocab_size = 300, got -1"),
        ([VOCAB_SIZE], ValueError, "to below vocab_size = 300, got 300 to 300"),
        ("\ud800", ValueError, r"prompt must be valid Unicode text, got '\\ud800'"),
    ],
)
def test_a_malformed_prompt_is_refused_alone(
    llm: LLM, prompt: Any, error: type[Exception], rule: str
) -> None:
    found = among_others(llm, prompt)
    with pytest.raises(error, match=rule):
        raise found if isinstance(found, BaseException) else AssertionError(found)
    with pytest.raises(error, match=rule):
        llm.stream(prompt, GREEDY)  # at once, not with the first token


@pytest.mark.parametrize(
    "prompt", [np.array(GOOD), list(np.array(GOOD, dtype=np.int32)), torch.tensor(GOOD)]
)
def test_integers_of_other_libraries_are_token_ids(llm: LLM, prompt: Any) -> None:
    [done] = llm.generate([prompt], GREEDY)
    assert done == llm.generate([GOOD], GREEDY)[0]
    assert set(map(type, done.prompt_token_ids)) == {int}
    assert among_others(llm, prompt) == done.token_ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=3, top_k=2**70, seed=1),
        SamplingParams(max_tokens=3, top_p=1e-320, min_p=1e-320, seed=2**64 - 1),
        SamplingParams(max_tokens=3, temperature=0.01, repetition_penalty=100.0, seed=1),
        SamplingParams(max_tokens=3, temperature=100.0, repetition_penalty=0.01, seed=1),
        SamplingParams(max_tokens=3, seed=5, logprobs=20, prompt_logprobs=20),
        SamplingParams(max_tokens=3, seed=5, logit_bias=dict.fromkeys(range(VOCAB_SIZE), -100.0)),
    ],
)
def test_the_far_ends_of_what_may_be_asked(llm: LLM, params: SamplingParams) -> None:
    """Each computes; none makes a step fail that others share."""
    found = among_others(llm, GOOD, params)
    assert isinstance(found, tuple), found
    assert len(found) == 3
    if params.top_k is not None:  # more than all is all
        assert found == among_others(llm, GOOD, SamplingParams(max_tokens=3, seed=1))


def test_a_text_alone_is_one_prompt(llm: LLM) -> None:
    done = llm.generate("hello", GREEDY)
    assert done == llm.generate(["hello"], GREEDY)
    assert asyncio.run(llm.generate_async("hello", GREEDY)) == done
    assert len(done) == 1


@pytest.mark.parametrize(
    ("prompts", "rule"),
    [
        (None, "prompts must be a text, or a list of texts and of lists of token ids, got None"),
        (b"hello", "prompts must be a text, or a list .*, got b'hello'"),
        ({"prompt": "hello"}, "prompts must be a text, or a list .*, got {'prompt': 'hello'}"),
        ([1, 2], "prompts must hold texts and lists of token ids, got 1; token ids of one prompt"),
        ([None], "prompt must be a text or a list of token ids, got None"),
        ([["a"]], "prompt must hold token ids, which are integers, got 'a' at place 0"),
    ],
)
def test_what_is_no_list_of_prompts(llm: LLM, prompts: Any, rule: str) -> None:
    with pytest.raises(TypeError, match=rule):
        llm.generate(prompts, GREEDY)
    with pytest.raises(TypeError, match=rule):
        asyncio.run(llm.generate_async(prompts, GREEDY))


def test_the_least_temperature_takes_the_most_probable_token(llm: LLM) -> None:
    least = SamplingParams(max_tokens=6, temperature=0.01, seed=1)
    [done], [greedy] = llm.generate([GOOD], least), llm.generate([GOOD], GREEDY)
    assert done.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({"params": {"max_tokens": 4}}, "params must be one SamplingParams or None, got {'max_tok"),
        ({"params": [GREEDY]}, r"params must be one SamplingParams or None, got \[SamplingParams"),
        ({"grammar": "[0-9]"}, "grammar must be a Grammar, of .* or None, got '\\[0-9\\]'"),
        ({"options": {"priority": 1}}, "options must be a RequestOptions or None, got {'priority"),
    ],
)
def test_what_is_no_argument_of_a_call(llm: LLM, asked: dict[str, Any], rule: str) -> None:
    for run in (llm.generate, llm.stream):
        with pytest.raises(TypeError, match=rule):
            run("hello", **asked)
    with pytest.raises(TypeError, match=rule):
        asyncio.run(llm.generate_async(["hello", "x"], **asked))


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({"speculation": "ngram"}, "speculation must be a PromptLookupConfig, .*, got 'ngram'"),
        ({"speculation": 5}, "speculation must be a PromptLookupConfig, .* or None, got 5"),
        ({"draft": 5}, "draft must be a DraftModel or None, got 5"),
        ({"memory_bytes": "1g"}, "memory_bytes must be an integer or None, got '1g'"),
        ({"memory_bytes": 1e9}, "memory_bytes must be an integer or None, got 1000000000.0"),
        ({"context_tokens": True}, "context_tokens must be an integer or None, got True"),
        ({"host_bytes": None}, "host_bytes must be an integer, got None"),
        ({"tensor_parallel": "2"}, "tensor_parallel must be an integer, got '2'"),
        ({"dtype": "bfloat16"}, "dtype must be a dtype of torch, .*, got 'bfloat16'"),
    ],
)
def test_what_is_no_argument_of_an_llm(llm: LLM, asked: dict[str, Any], rule: str) -> None:
    with pytest.raises(TypeError, match=rule):
        LLM(TextModel(llm.model, llm.tokenizer), **asked)


def test_what_is_no_source(llm: LLM) -> None:
    rule = "source must be a checkpoint's folder, or a TextModel of model and tokenizer, got Hybrid"
    model: Any = llm.model
    with pytest.raises(TypeError, match=rule):
        LLM(model)


def test_a_grammar_is_a_text() -> None:
    source: Any = 5
    with pytest.raises(TypeError, match="source must be a text, got 5"):
        Grammar(source)
