"""What sf.LLM passes on: bits of states, and what one call asks beside its tokens."""

import asyncio

import pytest
from engine_helpers import tiny_model
from tokenizers import Tokenizer

import sevenfold as sf
from sevenfold.config import ConfigError
from sevenfold.engine import LLM, RequestOptions, SamplingParams, TextModel, sizing
from sevenfold.engine.precision import SnapshotDtype, StateDtype

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
LONG = [n * 7 % 290 for n in range(300)]


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer) -> TextModel:
    return TextModel(tiny_model("llf", max_position_embeddings=400), tokenizer)


def make_llm(source: TextModel) -> LLM:
    return LLM(source, memory_bytes=1 << 22)


@pytest.mark.parametrize(
    ("states", "snapshots"), [("fp16", "int8"), ("int8", "auto"), ("fp32", "fp16")]
)
def test_states_and_snapshots_in_fewer_bits(
    source: TextModel, states: StateDtype, snapshots: SnapshotDtype
) -> None:
    plain = make_llm(source)
    llm = LLM(source, memory_bytes=1 << 22, states=states, snapshots=snapshots)
    assert (llm.plan.state_dtype, llm.plan.snapshot_dtype) == (states, snapshots)
    assert llm.plan.snapshot_bytes < plain.plan.snapshot_bytes
    # It computes, and goes on from a snapshot in so few bits.
    for seed in (5, 2**64 - 1):  # of the stochastic rounding as well
        params = SamplingParams(max_tokens=4, seed=seed)
        cached = [llm.generate([LONG], params)[0].cached_tokens for _ in range(2)]
        assert cached[1] == 256


def test_bits_that_do_not_go(source: TextModel) -> None:
    with pytest.raises(ConfigError, match="LLM: states must be valid"):
        LLM(source, states="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="LLM: snapshots must be valid"):
        LLM(source, snapshots="bf16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="state_dtype must not be bf16 where"):
        LLM(source, memory_bytes=1 << 22, states="bf16")


def test_the_greater_priority_comes_first(
    source: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "_CPU_LIMITS", sizing._CPU_LIMITS | {"max_running": 1})
    llm, ended = make_llm(source), []

    async def run(name: str, priority: int) -> None:
        [_] = await llm.generate_async([[7]], GREEDY, options=RequestOptions(priority=priority))
        ended.append(name)

    async def all_of_them() -> None:
        await asyncio.gather(run("first", 0), run("second", 0), run("urgent", 3))

    asyncio.run(all_of_them())
    assert sorted(ended) == ["first", "second", "urgent"]
    assert ended.index("urgent") < ended.index("second")


def test_a_deadline_gives_up_one_output(source: TextModel) -> None:
    llm = make_llm(source)
    late = RequestOptions(deadline_s=1e-9)
    rule = "the output must end within its deadline of 1e-09 s, and did not"
    with pytest.raises(sf.RequestFailedError, match=rule):
        llm.generate([LONG], GREEDY, options=late)
    in_time = llm.generate([LONG], GREEDY, options=RequestOptions(deadline_s=1e6))
    assert len(in_time[0].token_ids) == 4


def test_a_salt_divides_the_cache(source: TextModel) -> None:
    llm = make_llm(source)
    hits = []
    for salt in ("a", "b", None, "a", None):
        [done] = llm.generate([LONG], GREEDY, options=RequestOptions(cache_salt=salt))
        hits.append(done.cached_tokens)
    assert hits == [0, 0, 0, 256, 256]


def test_a_session_keeps_its_prefix_through_a_crowd(source: TextModel) -> None:
    hits = {}
    for session in (None, "mine"):
        llm = LLM(source, memory_bytes=1 << 18)
        options = RequestOptions(session=session)
        [first] = llm.generate([LONG[:200]], GREEDY, options=options)
        for n in range(60):
            llm.generate([[n, *LONG[1:]]], GREEDY)
        second = [*first.prompt_token_ids, *first.token_ids, 9, 9]
        hits[session] = llm.generate([second], GREEDY, options=options)[0].cached_tokens
    assert hits == {None: 0, "mine": 192}


@pytest.mark.parametrize(("marks", "hit"), [((), 0), ((130,), 128)])
def test_a_mark_is_where_another_prompt_goes_on(
    source: TextModel, marks: tuple[int, ...], hit: int
) -> None:
    llm = make_llm(source)
    llm.generate([LONG], GREEDY, options=RequestOptions(marks=marks))
    [other] = llm.generate([[*LONG[:140], *range(60)]], GREEDY)
    assert other.cached_tokens == hit
    [alone] = make_llm(source).generate([other.prompt_token_ids], GREEDY)
    assert other.token_ids == alone.token_ids


def test_options_that_do_not_suit_the_prompts(source: TextModel) -> None:
    llm = make_llm(source)
    with pytest.raises(ValueError, match="marks must rise from 1 or more to 3 or fewer"):
        llm.stream([1, 2, 3], GREEDY, options=RequestOptions(marks=(4,)))
    for options in (RequestOptions(marks=(1,)), RequestOptions(session="a")):
        with pytest.raises(ValueError, match="must be left out for more than one prompt, got"):
            llm.generate([[1, 2], [3, 4]], GREEDY, options=options)
        assert len(llm.generate([[1, 2]], GREEDY, options=options)) == 1
