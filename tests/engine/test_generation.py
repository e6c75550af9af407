"""Generation: the same tokens whatever the cache, the chunks and the batch; how outputs end."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from unittest import mock

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

from sevenfold.config import CheckpointError, ConfigError
from sevenfold.engine import (
    LLM,
    Completion,
    Decoder,
    Grammar,
    RequestFailedError,
    SamplingParams,
    TextModel,
    sizing,
)
from sevenfold.engine.speculation import PromptLookupConfig
from sevenfold.models import HybridModel
from sevenfold.models.checkpoint import save_model
from sevenfold.ops.testing import check_error

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


def make_llm(model: HybridModel, tokenizer: Tokenizer) -> LLM:
    return LLM(TextModel(model, tokenizer), memory_bytes=1 << 22)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> LLM:
    return make_llm(tiny_model(), tokenizer)


def test_guesses_change_no_token(llm: LLM, tokenizer: Tokenizer) -> None:
    speculation = PromptLookupConfig(min_match_tokens=1, adaptive=False)
    source = TextModel(llm.model, tokenizer)
    guessing = LLM(source, memory_bytes=1 << 22, speculation=speculation)
    for params in (GREEDY, SAMPLED):
        expected = [one.token_ids for one in llm.generate(PROMPTS, params)]
        assert [one.token_ids for one in guessing.generate(PROMPTS, params)] == expected
    counters = guessing.speculation_counters()
    assert counters is not None
    assert counters.num_drafted_tokens > 0
    assert llm.speculation_counters() is None


def alone(llm: LLM, params: SamplingParams) -> list[Completion]:
    return [done for prompt in PROMPTS for done in llm.generate([prompt], params)]


@pytest.mark.parametrize("mix", MIXES)
def test_greedy_tokens_whatever_the_cache_and_the_batch(mix: str, tokenizer: Tokenizer) -> None:
    model = tiny_model(**MIXES[mix])
    llm = make_llm(model, tokenizer)
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    assert sorted(len(prompt) > 4 for prompt in prompts) == [False, False, True]
    expected = [tuple(uncached(llm.model, prompt, 10)) for prompt in prompts]
    assert len({tokens[0] for tokens in expected}) > 1
    done = llm.generate(PROMPTS, GREEDY)
    assert [one.token_ids for one in done] == expected
    assert [list(one.prompt_token_ids) for one in done] == prompts
    assert [one.finish_reason for one in done] == ["length"] * 3
    assert [one.text for one in done] == [tokenizer.decode(one.token_ids) for one in done]
    assert llm.generate(prompts, GREEDY) == done
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
    params = SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=100.0)
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
    ending = make_llm(with_eos(llm.model, eos), tokenizer)
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


def test_defaults_are_those_of_the_parameters(llm: LLM) -> None:
    [done] = llm.generate(PROMPTS[:1])
    assert len(done.token_ids) == SamplingParams().max_tokens == 64
    assert len(list(llm.stream(PROMPTS[0]))) == 64


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_a_model_in_training_mode_is_put_to_rest(tokenizer: Tokenizer) -> None:
    assert not make_llm(tiny_model().train(), tokenizer).model.training


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
        TextModel(tiny_model(vocab_size=VOCAB_SIZE - 1), tokenizer)
    assert make_llm(tiny_model(vocab_size=VOCAB_SIZE + 1), tokenizer).tokenizer is tokenizer


def test_load(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(llm.model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"tokenizer.json must exist to generate text; copy"):
        LLM(tmp_path / "model")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "model")
    loaded = LLM(str(tmp_path / "model"))
    assert loaded.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)
    assert loaded.tokenizer.token_to_id(EOS) == tokenizer.token_to_id(EOS)
    low = LLM(tmp_path / "model", dtype=torch.bfloat16)
    assert low.model.dtype == torch.bfloat16
    ours = dict(low.model.named_parameters())
    for name, parameter in llm.model.named_parameters():
        assert torch.equal(ours[name], parameter.to(ours[name].dtype))


def test_logprobs_come_with_each_token(tokenizer: Tokenizer) -> None:
    llm = make_llm(tiny_model(), tokenizer)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, prompt_logprobs=2)
    asked = llm.generate(PROMPTS, params)
    plain = llm.generate(
        PROMPTS, params.model_copy(update={"logprobs": None, "prompt_logprobs": None})
    )
    for one, other in zip(asked, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert other.logprobs is other.prompt_logprobs is None
        assert one.logprobs is not None
        assert len(one.logprobs) == 4
        for token, logprobs in zip(one.token_ids, one.logprobs, strict=True):
            assert logprobs.top[0] == (token, logprobs.chosen)
            assert len(logprobs.top) == 3
    ids = torch.tensor([[*asked[0].prompt_token_ids, *asked[0].token_ids]])

    def chosen(dtype: torch.dtype) -> torch.Tensor:
        z = tiny_model(dtype=dtype)(ids)[0, :-1].to(torch.float64).log_softmax(-1)
        return z.gather(-1, ids[0, 1:, None])[:, 0]

    found = [*(asked[0].prompt_logprobs or ()), *(asked[0].logprobs or ())]
    values = torch.tensor([one.chosen for one in found], dtype=torch.float64)
    check_error("logprobs", values, chosen(torch.float32), chosen(torch.float64))
    assert [len(one.top) for one in asked[0].prompt_logprobs or ()] == [2] * (ids.shape[1] - 5)


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


def test_a_second_call_goes_on_from_the_first(llm: LLM, tokenizer: Tokenizer) -> None:
    other = make_llm(llm.model, tokenizer)
    prompt = [n * 7 % 290 for n in range(70)]
    [first] = other.generate([prompt], GREEDY)
    [second] = other.generate([prompt], GREEDY)
    assert (first.cached_tokens, second.cached_tokens) == (0, 64)
    assert first.token_ids == second.token_ids


def test_more_prompts_than_may_wait(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"max_running": 2, "max_waiting": 3}
    monkeypatch.setattr(sizing, "_CPU_LIMITS", sizing._CPU_LIMITS | few)
    prompts = [[n, n + 1] for n in range(40)]
    done = make_llm(llm.model, llm.tokenizer).generate(
        prompts, SamplingParams(max_tokens=1, temperature=0.0)
    )
    assert [list(one.prompt_token_ids) for one in done] == prompts
    with torch.inference_mode():
        logits = llm.model(torch.tensor(prompts))[:, -1]
    assert torch.equal(torch.tensor([one.token_ids[0] for one in done]), logits.argmax(-1))


def test_bad_words_are_never_said(llm: LLM, tokenizer: Tokenizer) -> None:
    [plain] = llm.generate(PROMPTS[:1], GREEDY)
    word = tokenizer.decode(list(plain.token_ids[2:4]))
    tokens = tokenizer.encode(word, add_special_tokens=False).ids
    assert tuple(tokens) == plain.token_ids[2:4], "the word's own tokens"
    [done] = llm.generate(PROMPTS[:1], GREEDY.model_copy(update={"bad_words": (word,)}))
    assert done.token_ids[:3] == plain.token_ids[:3]
    assert done.token_ids[3] != plain.token_ids[3]
    pairs = zip(done.token_ids, done.token_ids[1:], strict=False)
    assert tuple(tokens) not in pairs


def test_outputs_match_their_grammar(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    wide = SamplingParams(max_tokens=40, seed=3)
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    [done, other] = llm.generate(PROMPTS[:2], wide, grammar=Grammar.json_schema(schema))
    assert json.loads(done.text)["a"] in ("x", "yy")
    assert json.loads(other.text)["a"] in ("x", "yy")
    assert done.finish_reason == other.finish_reason == "stop"
    [done] = llm.generate(PROMPTS[:1], wide, grammar=Grammar.regex("[0-9]{3}-[a-c]!"))
    assert re.fullmatch("[0-9]{3}-[a-c]!", done.text)
    text = "".join(
        d.text for d in llm.stream("x", wide, grammar=Grammar.lark('start: "yes" | "no"'))
    )
    assert text in ("yes", "no")
    with pytest.raises(ValueError, match="grammar must be valid"):
        llm.generate(PROMPTS[:1], wide, grammar=Grammar.lark("start: nothing"))


def test_asynchronous_outputs_run_together(llm: LLM) -> None:
    expected = [done.text for done in alone(llm, SAMPLED)]

    async def text(prompt: str) -> str:
        return "".join([delta.text async for delta in llm.stream_async(prompt, SAMPLED)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(text(prompt) for prompt in PROMPTS))

    assert asyncio.run(all_of_them()) == expected
    assert asyncio.run(llm.generate_async(PROMPTS, SAMPLED)) == llm.generate(PROMPTS, SAMPLED)
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        asyncio.run(llm.generate_async(["x", ""], SAMPLED))


def test_an_iterator_that_is_closed_cancels(llm: LLM, tokenizer: Tokenizer) -> None:
    other = make_llm(llm.model, tokenizer)
    engine = other._driver._engine
    idle = engine.cache.usage()
    stream = other.stream("x", SAMPLED)
    next(stream)
    stream.close()

    async def leave_early() -> None:
        deltas = other.stream_async("x", SAMPLED)
        await anext(deltas)
        await deltas.aclose()

    asyncio.run(leave_early())
    other._thread.submit(lambda: None).result()
    other.generate(["y"], SamplingParams(max_tokens=1))
    engine.step()
    assert not engine.has_work
    engine.cache.clear()
    assert engine.cache.usage() == idle


def test_a_failed_output_raises_and_the_engine_goes_on(tokenizer: Tokenizer) -> None:
    model = tiny_model()
    model.embed_tokens.weight[7] = float("nan")
    llm = make_llm(model, tokenizer)
    with pytest.raises(RequestFailedError, match="logits are not finite"):
        llm.generate([[7]], GREEDY)
    with pytest.raises(RequestFailedError, match="logits are not finite"):
        asyncio.run(llm.generate_async([[8], [7]], GREEDY))
    assert len(llm.generate([[8]], GREEDY)[0].token_ids) == 10


def test_an_interrupted_step_leaves_an_engine_that_works(
    llm: LLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_llm(llm.model, tokenizer)
    stream = other.stream("x", GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(HybridModel, "hidden", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            other.generate(PROMPTS, GREEDY)
    with pytest.raises(RequestFailedError, match="a step was interrupted"):
        next(stream)
    assert other.generate(PROMPTS, GREEDY) == llm.generate(PROMPTS, GREEDY)


def test_arguments_of_a_model_that_is_loaded(llm: LLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="device, dtype, weights and tensor_parallel must be left"):
        LLM(TextModel(llm.model, tokenizer), device="cpu")
    with pytest.raises(ConfigError, match="context_tokens must lie in 1 to"):
        LLM(TextModel(llm.model, tokenizer), context_tokens=101)
    with pytest.raises(ValueError, match="prompt must hold tokens from 0 to below vocab_size"):
        llm.generate([[VOCAB_SIZE]], GREEDY)
