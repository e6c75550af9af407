"""Generation: the same tokens whatever the cache, the chunks and the batch; how outputs end."""

import shutil
from pathlib import Path

import pytest
import torch
from engine_helpers import (
    EOS,
    MOE,
    PROMPTS,
    VOCAB_SIZE,
    encode,
    tiny_model,
    uncached,
    with_eos,
)
from tokenizers import Tokenizer

from sevenfold.config import CheckpointError
from sevenfold.engine import LLM, Completion, Decoder, SamplingParams
from sevenfold.models.checkpoint import save_model

# Windows of 4 are smaller than most prompts, and one of 64 is larger than all.
MIXES = {
    "linear": {"layers": "ll"},
    "full": {"layers": "ff"},
    "sliding": {"layers": "ss"},
    "mixed": {"layers": "lsf"},
    "mixed, experts": {"layers": "lsf", "moe": MOE},
    "wide window, pre-norm": {"layers": "sl", "sliding_window": 64, "norm_placement": "pre_norm"},
    "7:1, experts": {"layers": "lllllllf", "moe": MOE},
}
GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=10, temperature=1.2, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> LLM:
    return LLM(tiny_model(), tokenizer)


def alone(llm: LLM, params: SamplingParams) -> list[Completion]:
    return [done for prompt in PROMPTS for done in llm.generate([prompt], params)]


@pytest.mark.parametrize("mix", MIXES)
def test_greedy_tokens_whatever_the_cache_the_chunks_and_the_batch(
    mix: str, tokenizer: Tokenizer
) -> None:
    model = tiny_model(**MIXES[mix])
    # Experts in fp64: on another machine two of a random model tied to within fp32's rounding.
    llm = LLM(model.double() if "moe" in MIXES[mix] else model, tokenizer)
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    assert sorted(len(prompt) > 4 for prompt in prompts) == [False, False, True]
    expected = [tuple(uncached(llm.model, prompt, 10)) for prompt in prompts]
    assert len({tokens[0] for tokens in expected}) > 1
    for chunk in (1, 3, 7, 2048):
        done = llm.generate(PROMPTS, GREEDY, prefill_chunk_tokens=chunk)
        assert [one.token_ids for one in done] == expected, chunk
        assert [list(one.prompt_token_ids) for one in done] == prompts
        assert [one.finish_reason for one in done] == ["length"] * 3
        assert [one.text for one in done] == [tokenizer.decode(one.token_ids) for one in done]
    assert alone(llm, GREEDY) == done


@pytest.mark.parametrize("mix", MIXES)
def test_the_decoders_logits_choose_as_whole_rows_do(mix: str, tokenizer: Tokenizer) -> None:
    model = tiny_model(**MIXES[mix])
    rows = [encode(tokenizer, prompt) for prompt in PROMPTS]
    decoder = Decoder(model, rows, capacity_tokens=max(map(len, rows)) + 6)
    logits = decoder.prefill(3)
    for step in range(6):
        expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
        assert logits.dtype == torch.float32
        assert torch.equal(logits.topk(5).indices, expected.topk(5).indices)
        if step == 2:  # the middle sequence goes
            decoder.keep([0, 2])
            rows = [rows[0], rows[2]]
        chosen = [40 + step, 90 - step, 7][: len(rows)]
        logits = decoder.step(chosen)
        rows = [[*row, token] for row, token in zip(rows, chosen, strict=True)]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SAMPLED,
        SamplingParams(max_tokens=10, temperature=0.0, repetition_penalty=1.8),
        SamplingParams(max_tokens=10, top_k=20, repetition_penalty=1.3, seed=3),
    ],
)
def test_each_prompt_of_a_batch_as_if_alone(llm: LLM, params: SamplingParams) -> None:
    done = llm.generate(PROMPTS, params)
    assert done == alone(llm, params)
    assert done[::-1] == llm.generate(PROMPTS[::-1], params)
    assert len({one.token_ids for one in done}) == 3


def test_a_seed_repeats_and_another_does_not(llm: LLM) -> None:
    again = [llm.generate(PROMPTS, SAMPLED) for _ in range(2)]
    assert again[0] == again[1]
    other = llm.generate(PROMPTS, SAMPLED.model_copy(update={"seed": 8}))
    free = SAMPLED.model_copy(update={"seed": None})
    drawn = {llm.generate(PROMPTS[:1], free)[0].token_ids for _ in range(3)}
    assert all(a.token_ids != b.token_ids for a, b in zip(again[0], other, strict=True))
    assert len(drawn) > 1


def test_the_penalty_counts_prompt_and_output(llm: LLM, tokenizer: Tokenizer) -> None:
    """So harsh a penalty forbids every repetition; without it the tiny model repeats itself."""
    params = SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1e9)
    for done in llm.generate(PROMPTS, params):
        tokens = [*set(done.prompt_token_ids), *done.token_ids]
        assert len(set(tokens)) == len(tokens)
    plain = llm.generate(PROMPTS[:1], params.model_copy(update={"repetition_penalty": 1.0}))[0]
    assert len(set(plain.token_ids)) < 30


def first_seen(done: list[Completion]) -> int:
    """A token that the first output has, not at once, and the others do not have as early."""
    first, *others = (one.token_ids for one in done)
    return next(t for t in first[2:] if all(t not in o for o in others) and t not in first[:2])


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_eos_ends_one_output_and_no_other(
    llm: LLM, tokenizer: Tokenizer, params: SamplingParams
) -> None:
    before = llm.generate(PROMPTS, params)
    eos = first_seen(before)
    ending = LLM(with_eos(llm.model, eos), tokenizer)
    done = ending.generate(PROMPTS, params)
    kept = before[0].token_ids[: before[0].token_ids.index(eos) + 1]
    assert (done[0].token_ids, done[0].finish_reason) == (kept, "stop")
    assert done[0].text == tokenizer.decode(kept[:-1])
    assert done[1:] == before[1:]
    ignoring = params.model_copy(update={"ignore_eos": True})
    assert ending.generate(PROMPTS, ignoring) == before


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_stop_string_ends_one_output_and_no_other(llm: LLM, params: SamplingParams) -> None:
    before = llm.generate(PROMPTS, params)
    texts = [one.text for one in before]
    # Two characters of one text that no other has; they may lie in two tokens.
    for victim in range(3):
        others = "".join(texts[:victim] + texts[victim + 1 :])
        pairs = (texts[victim][at : at + 2] for at in range(1, len(texts[victim]) - 1))
        stop = next(pair for pair in pairs if pair not in others)
        done = llm.generate(PROMPTS, params.model_copy(update={"stop": (stop,)}))
        assert done[victim].text == texts[victim][: texts[victim].index(stop)]
        assert done[victim].finish_reason == "stop"
        length = len(done[victim].token_ids)
        assert 0 < length <= 10
        assert done[victim].token_ids == before[victim].token_ids[:length]
        assert [d for n, d in enumerate(done) if n != victim] == [
            b for n, b in enumerate(before) if n != victim
        ]


def test_a_stop_string_that_the_last_flush_completes(llm: LLM, tokenizer: Tokenizer) -> None:
    """An incomplete character at the end is U+FFFD in the text, and may be asked to stop it."""
    plain = llm.generate(PROMPTS, GREEDY)
    cut = next(
        (one.prompt_token_ids, n)
        for one in plain
        for n in range(1, 11)
        if tokenizer.decode(one.token_ids[:n]).endswith("\ufffd")
        and "\ufffd" not in tokenizer.decode(one.token_ids[: n - 1])
    )
    prompt = tokenizer.decode(cut[0])
    for stop, reason in ((), "length"), (("\ufffd",), "stop"):
        params = GREEDY.model_copy(update={"max_tokens": cut[1], "stop": stop})
        [done] = llm.generate([prompt], params)
        assert (done.finish_reason, len(done.token_ids)) == (reason, cut[1])
        assert done.text.endswith("\ufffd") == (reason == "length")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_stream_joins_to_the_text(llm: LLM, tokenizer: Tokenizer, params: SamplingParams) -> None:
    for prompt in PROMPTS:
        [done] = llm.generate([prompt], params)
        deltas = list(llm.stream(prompt, params))
        assert "".join(delta.text for delta in deltas) == done.text
        assert tuple(delta.token_id for delta in deltas) == done.token_ids
        assert [delta.finish_reason for delta in deltas] == [None] * 9 + ["length"]
        assert {delta.index for delta in deltas} == {0}


def test_defaults_are_those_of_the_parameters(llm: LLM) -> None:
    [done] = llm.generate(PROMPTS[:1])
    assert len(done.token_ids) == SamplingParams().max_tokens == 64
    assert len(list(llm.stream(PROMPTS[0]))) == 64


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_a_model_in_training_mode_is_put_to_rest(tokenizer: Tokenizer) -> None:
    assert not LLM(tiny_model().train(), tokenizer).model.training


def test_the_context_limit(llm: LLM, tokenizer: Tokenizer) -> None:
    prompt = "x" * 90
    assert len(encode(tokenizer, prompt)) == 90
    [done] = llm.generate([prompt], GREEDY)
    assert list(done.token_ids) == uncached(llm.model, encode(tokenizer, prompt), 10)
    rule = "prompt and max_tokens must fit into max_position_embeddings = 100 tokens, got 91 .* 10"
    for run in (lambda p: llm.generate(["x", p], GREEDY), lambda p: llm.stream(p, GREEDY)):
        with pytest.raises(ValueError, match=rule):
            run(prompt + "x")


def test_prompts_without_a_token(llm: LLM) -> None:
    for run in (lambda p: llm.generate(["x", p], GREEDY), lambda p: llm.stream(p, GREEDY)):
        with pytest.raises(ValueError, match="prompt must have at least one token, got ''"):
            run("")
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts must be one or more, of at least one token"):
            Decoder(llm.model, prompts, capacity_tokens=4)


def test_a_tokenizer_larger_than_the_vocabulary(tokenizer: Tokenizer) -> None:
    rule = f"tokenizer must have at most the model's {VOCAB_SIZE - 1} tokens, got {VOCAB_SIZE}"
    with pytest.raises(ValueError, match=rule):
        LLM(tiny_model(vocab_size=VOCAB_SIZE - 1), tokenizer)
    assert LLM(tiny_model(vocab_size=VOCAB_SIZE + 1), tokenizer).tokenizer is tokenizer


def test_load(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(llm.model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tokenizer.json must exist to generate text; copy"):
        LLM.load(tmp_path / "model")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "model")
    loaded = LLM.load(str(tmp_path / "model"))
    assert loaded.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)
    assert loaded.tokenizer.token_to_id(EOS) == tokenizer.token_to_id(EOS)
    low = LLM.load(tmp_path / "model", dtype=torch.bfloat16)
    assert low.model.dtype == torch.bfloat16
    ours = dict(low.model.named_parameters())
    for name, parameter in llm.model.named_parameters():
        assert torch.equal(ours[name], parameter.to(ours[name].dtype))


def test_logprobs_come_with_each_token(tokenizer: Tokenizer) -> None:
    llm = LLM(tiny_model().double(), tokenizer)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3)
    asked = llm.generate(PROMPTS, params)
    plain = llm.generate(PROMPTS, params.model_copy(update={"logprobs": None}))
    for one, other in zip(asked, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert other.logprobs is None
        assert one.logprobs is not None
        assert len(one.logprobs) == 4
        for token, logprobs in zip(one.token_ids, one.logprobs, strict=True):
            assert logprobs.top[0] == (token, logprobs.chosen)
            assert len(logprobs.top) == 3
    with torch.no_grad():
        row = torch.tensor([[*asked[0].prompt_token_ids, *asked[0].token_ids]])
        z = llm.model(row)[0].log_softmax(-1)
    first = len(asked[0].prompt_token_ids) - 1
    for n, logprobs in enumerate(asked[0].logprobs or ()):
        assert logprobs.chosen == pytest.approx(float(z[first + n, asked[0].token_ids[n]]))


def test_stop_tokens_and_biases(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    (usual,) = llm.generate(PROMPTS[:1], greedy)
    third = usual.token_ids[2]
    (stopped,) = llm.generate(
        PROMPTS[:1], SamplingParams(**(greedy.model_dump() | {"stop_token_ids": (third,)}))
    )
    at = usual.token_ids.index(third)
    assert stopped.token_ids == usual.token_ids[: at + 1]
    assert stopped.finish_reason == "stop"
    biased = SamplingParams(max_tokens=3, temperature=0.0, logit_bias={third: 100.0})
    assert llm.generate(PROMPTS[:1], biased)[0].token_ids == (third,) * 3
    with pytest.raises(
        ValueError, match=f"logit_bias must name tokens below vocab_size = {VOCAB_SIZE}"
    ):
        llm.generate(PROMPTS[:1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}))
