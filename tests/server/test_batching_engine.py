"""The engine behind the server: the same tokens as `LLM`, many requests at a time."""

import asyncio
import json
import re
import threading
from collections.abc import Callable

import pytest
import torch
from server_helpers import (
    CONTEXT,
    EOS,
    ScriptedEngine,
    chat,
    client_of,
    events,
    make_engine,
    make_llm,
    message,
    settled,
    streamed,
)

from sevenfold.engine import LLM, SamplingParams, TextModel
from sevenfold.engine.sizing import size_engine
from sevenfold.engine.warm_up import WarmUpStoppedError
from sevenfold.ops.testing import check_error
from sevenfold.server import (
    BatchingEngine,
    EngineStats,
    EngineStoppedError,
    GenerationRequest,
    RequestFailedError,
    ServerSettings,
    TemplateSource,
)

pytestmark = pytest.mark.anyio
BARE = TemplateSource("{{ messages[0].content }}", stop=())
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"$ref": "#/$defs/at"}}, "required": ["at"],
    "$defs": {"at": {"enum": ["x", "y"]}}, "additionalProperties": False}}}  # fmt: skip


async def complete(client, **fields):
    return (await client.post("/v1/completions", json=fields)).json()


async def test_the_same_tokens_as_offline(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=20, temperature=0.0)
    drawn = SamplingParams(max_tokens=20, seed=5, top_p=0.9, presence_penalty=0.5)
    expected = [llm.generate(["herons"], params)[0].text for params in (greedy, drawn)]
    async with client_of(make_engine(llm), template=BARE) as client:
        fields = {"prompt": "herons", "max_tokens": 20}
        first = await complete(client, **fields, temperature=0)
        second = await complete(client, **fields, seed=5, top_p=0.9, presence_penalty=0.5)
        messages = [{"role": "user", "content": "herons"}]
        stream = await chat(client, messages=messages, max_tokens=20, temperature=0, stream=True)
        n = await complete(client, **fields, seed=4, top_p=0.9, presence_penalty=0.5, n=2)
    assert [first["choices"][0]["text"], second["choices"][0]["text"]] == expected
    assert streamed(events(stream), 0) == expected[0]
    assert n["choices"][1]["text"] == expected[1]
    assert first["usage"]["prompt_tokens_details"]["cache_miss_reason"] == "too_short"


async def test_log_probabilities_of_prompt_and_output(llm: LLM) -> None:
    text = "hij" + "The wall is old, and the field lies still. " * 2
    [done] = llm.generate([text], SamplingParams(max_tokens=6, temperature=0.0))
    prompt = list(done.prompt_token_ids)
    assert prompt[:3] == [71, 72, 73]
    async with client_of(make_engine(llm)) as client:
        fields = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        said = await complete(client, **fields, echo=True, logprobs=2)
    logprobs = said["choices"][0]["logprobs"]
    ids = torch.tensor([[*prompt, *done.token_ids]])

    def chosen(dtype: torch.dtype) -> torch.Tensor:
        model = make_llm().model.to(dtype)
        values = model(ids)[0, :-1].to(torch.float64).log_softmax(-1)
        return values.gather(-1, ids[0, 1:, None])[:, 0]

    assert logprobs["token_logprobs"][0] is None
    found = torch.tensor(logprobs["token_logprobs"][1:], dtype=torch.float64)
    check_error("logprobs", found, chosen(torch.float32), chosen(torch.float64))
    assert logprobs["tokens"][:3] == ["h", "i", "j"]
    assert len(logprobs["top_logprobs"][1]) >= 2


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "maximum": 99, "minimum": 0},
        "b": {"enum": ["x", "yy"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


async def test_answers_follow_their_grammars(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    async with client_of(make_engine(llm)) as client:
        wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
        made = (await chat(client, response_format=wanted, max_tokens=200, seed=1, n=2)).json()
        for choice in made["choices"]:
            value = json.loads(choice["message"]["content"])
            assert set(value) == {"a", "b"}
            assert 0 <= value["a"] <= 99
            assert value["b"] in ("x", "yy")
            assert choice["finish_reason"] == "stop"
        regex = {"type": "regex", "regex": "[0-9]{3}-[a-c]+!"}
        made = (await chat(client, response_format=regex, max_tokens=200, seed=2)).json()
        assert re.fullmatch("[0-9]{3}-[a-c]+!", made["choices"][0]["message"]["content"])
        lark = {"type": "grammar", "grammar": 'start: "yes" | "no"'}
        made = (await chat(client, response_format=lark, max_tokens=9)).json()
        assert made["choices"][0]["message"]["content"] in ("yes", "no")
        for choice in ("required", {"type": "function", "function": {"name": "look"}}):
            fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 100, "seed": 3}
            response = await chat(client, messages=[{"role": "user", "content": ""}], **fields)
            assert response.status_code == 200, response.text
            made = response.json()["choices"][0]
            assert made["finish_reason"] == "tool_calls", made
            [call] = made["message"]["tool_calls"]
            assert call["function"]["name"] == "look"
            assert json.loads(call["function"]["arguments"])["at"] in ("x", "y")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"type": "json_schema"}, "of type json_schema must have json_schema, got none"),
        ({"type": "text", "regex": "a"}, "of type text must have no more, got regex"),
        ({"type": "regex", "regex": "a" * 1025}, "must have at most 1024 characters, got 1025"),
        ({"type": "regex", "regex": "("}, "response_format.regex must be valid"),
        ({"type": "grammar", "grammar": "start: nothing"}, "response_format.grammar must be valid"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "banana"}}},
            "response_format.json_schema.schema must be valid",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/x"}}},
            "response_format.json_schema.schema must be valid",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"pattern": "a" * 1025}}},
            "pattern must have at most 1024 characters",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"title": "a" * 70_000}}},
            "must have at most 65536 characters",
        ),
    ],
)
async def test_grammars_that_are_refused(llm: LLM, form: dict, said: str) -> None:
    pytest.importorskip("llguidance")
    async with client_of(make_engine(llm)) as client:
        response = await chat(client, response_format=form, max_tokens=3)
        assert response.status_code == 400, response.text
        assert said in message(response)


MANY = {"type": "object", "properties": {f"at_{n}": {"type": "integer"} for n in range(1500)}}
LATER = {"type": "object", "properties": {"a": MANY}, "required": ["a"],
    "additionalProperties": False}  # fmt: skip


async def test_a_grammar_beyond_a_limit_is_refused_with_it_or_fails_with_it(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    limit = "Parser Error: Current row has 6007 items; max is 2000"
    begins = "response_format.json_schema.schema must be one whose masks can be computed"
    fails = "the output's grammar has failed"
    async with client_of(make_engine(llm)) as client:
        for schema, status, said in ((MANY, 400, begins), (LATER, 500, fails)):
            form = {"type": "json_schema", "json_schema": {"schema": schema}}
            for seed in range(3):
                response = await chat(client, response_format=form, max_tokens=60, seed=seed)
                assert response.status_code == status, response.text
                assert f"{said}: {limit}" in message(response)


async def test_a_grammar_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    engine = ScriptedEngine(features=frozenset({"constraint"}))
    async with client_of(engine, ServerSettings(grammar_timeout_s=1e-6)) as client:
        form = {"type": "regex", "regex": "(a|b){50}"}
        response = await chat(client, response_format=form)
    assert "response_format.regex must compile within 1e-06 s" in message(response)


def asking(name: str, max_tokens: int, **fields: object) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(id=name, sampling=params, **({"prompt": (70,)} | fields))


async def outputs_of(engine: BatchingEngine, request: GenerationRequest) -> list:
    return [output async for output in engine.submit(request)]


async def told(engine: BatchingEngine, *, running: int) -> EngineStats:
    """What the thread tells of itself, which it does after its step: once so many run and hold."""
    for _ in range(500):
        stats = engine.stats()
        if stats.running == stats.states.used == running:
            break
        await asyncio.sleep(0.01)
    return engine.stats()


async def test_closing_an_iterator_frees_what_it_held(llm: LLM) -> None:
    engine = make_engine(llm)
    long, other = engine.submit(asking("a", 500)), engine.submit(asking("b", 500))
    await anext(long)
    await anext(other)
    stats = await told(engine, running=2)
    assert (stats.running, stats.states.used) == (2, 2)
    await long.aclose()
    await other.aclose()
    outputs = await outputs_of(engine, asking("c", 3))
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    stats = await told(engine, running=0)
    assert (stats.running, stats.states.used) == (0, 0)
    engine.close()
    assert not engine.healthy()
    with pytest.raises(EngineStoppedError):
        await outputs_of(engine, asking("d", 3))


async def test_many_at_once_are_answered_as_each_alone(llm: LLM) -> None:
    engine = make_engine(llm)
    prompts = [tuple(range(60 + n, 60 + n + 5 * (n % 7) + 1)) for n in range(24)]
    asked = [asking(str(n), 12, prompt=prompt) for n, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(outputs_of(engine, request) for request in asked))
    for n, answer in enumerate(answers):
        alone = await outputs_of(make_engine(llm), asking("alone", 12, prompt=prompts[n]))
        assert [o.token_id for o in answer] == [o.token_id for o in alone]


async def test_the_second_turn_hits_and_another_salt_does_not(llm: LLM) -> None:
    engine = make_engine(llm)
    first = tuple(n % 250 for n in range(150))
    answer = await outputs_of(engine, asking("a", 4, prompt=first, marks=(150,), salt=b"k"))
    assert answer[0].prompt.cached_tokens == 0
    turn = (*first, *(output.token_id for output in answer), 9, 9)
    second = await outputs_of(engine, asking("b", 4, prompt=turn, salt=b"k"))
    assert second[0].prompt.cached_tokens >= 128
    assert second[0].prompt.miss_reason is None
    stranger = await outputs_of(engine, asking("c", 4, prompt=turn, salt=b"other"))
    # Not "salt": that would tell one caller what another has sent.
    assert (stranger[0].prompt.cached_tokens, stranger[0].prompt.miss_reason) == (0, "cold")
    assert [o.token_id for o in second] == [o.token_id for o in stranger]
    assert engine.stats().cached_tokens >= 128


async def test_marks_of_callers_are_where_other_requests_go_on_from(llm: LLM) -> None:
    document = [n % 250 for n in range(200)]
    text = "".join(chr(65 + n % 26) for n in range(200))
    for marks, mark, least in (([200], {"cache_control": {"type": "ephemeral"}}, 192), ([], {}, 0)):

        def about(question: str, mark: dict = mark) -> list[dict]:
            parts = [{"text": text} | mark, {"text": question}]
            return [{"role": "user", "content": [{"type": "text"} | part for part in parts]}]

        async with client_of(make_engine(llm)) as client:
            for question in (3, 4):
                fields = {"prompt": [*document, *[question] * 100], "cache_marks": marks}
                said = await complete(client, **fields, max_tokens=1)
            asked = [await chat(client, messages=about(q * 99), max_tokens=1) for q in "ab"]
        for usage in (said["usage"], asked[1].json()["usage"]):
            assert usage["prompt_tokens_details"]["cached_tokens"] == least


async def test_a_conversation_goes_on_from_the_end_of_an_earlier_turn(llm: LLM) -> None:
    roles = ("user", "assistant")
    first = [{"role": roles[n % 2], "content": f"say {n}"} for n in range(26)]
    second = [*first[:18], {"role": "user", "content": "something else"}]
    async with client_of(make_engine(llm)) as client:
        await chat(client, messages=first, max_tokens=1)
        told = (await chat(client, messages=second, max_tokens=1)).json()["usage"]
        ends = (await client.post("/tokenize", json={"messages": first})).json()["marks"]
    shared = ends[1]  # all but 8 messages; those before are all but 16
    assert told["prompt_tokens_details"]["cached_tokens"] == shared // 64 * 64 > 0


async def test_a_deadline_and_a_request_that_cannot_fit(llm: LLM) -> None:
    engine = make_engine(llm)
    with pytest.raises(RequestFailedError, match="the output ended: deadline"):
        await outputs_of(engine, asking("late", 500, deadline_s=0.0))
    with pytest.raises(RequestFailedError, match=r"prompt \+ max_tokens - 1 must be at most 512"):
        await outputs_of(engine, asking("long", 513))
    assert len(await outputs_of(engine, asking("next", 2))) == 2


async def test_a_model_that_computes_nothing_fails_its_request_alone(llm: LLM) -> None:
    poisoned = make_llm()
    poisoned.model.embed_tokens.weight[70] = float("nan")
    async with client_of(make_engine(poisoned)) as client:
        both = [complete(client, prompt=[token], max_tokens=2) for token in (70, 71)]
        failed, served = await asyncio.gather(*both)
        assert "sevenfold_nonfinite_outputs_total 1.0" in (await client.get("/metrics")).text
    assert failed["error"]["code"] == "request_failed"
    assert "logits are not finite" in failed["error"]["message"]
    assert len(served["choices"]) == 1


async def test_warming_up_leaves_nothing_and_says_what_went_wrong(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llm)
    await engine.warm_up(print)
    await outputs_of(engine, asking("next", 1))  # the cache is emptied before a step
    stats = await told(engine, running=0)
    assert stats.steps > 0
    assert (stats.running, stats.snapshots.used, stats.pages.used) == (0, 0, 0)
    poisoned = make_llm()
    poisoned.model.embed_tokens.weight[0] = float("nan")
    with pytest.raises(RequestFailedError, match="tiny must answer a first request: the model's"):
        await make_engine(poisoned).warm_up(print)
    full = make_engine(llm)

    def fail() -> None:
        raise OSError(28, "No space left on device", "cache")

    monkeypatch.setattr(full._engine, "step", fail)
    with pytest.raises(
        EngineStoppedError, match=r"must take its first steps, got .* No space left"
    ):
        await full.warm_up(print)
    assert not full.healthy()
    cold = make_engine(llm)
    monkeypatch.setattr(cold._engine, "warm_up", lambda note: fail())
    with pytest.raises(EngineStoppedError, match=r"must take its first steps, got .* No space"):
        await cold.warm_up(print)


async def test_a_stop_gives_the_start_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, begun, stopped = make_engine(llm), threading.Event(), threading.Event()

    def warm_up(note: Callable[[str], None]) -> None:
        begun.set()
        assert stopped.wait(60)
        raise WarmUpStoppedError("told to")

    monkeypatch.setattr(engine._engine, "warm_up", warm_up)
    monkeypatch.setattr(engine._engine, "stop_warm_up", stopped.set)
    lines: list[str] = []
    warming = asyncio.create_task(engine.warm_up(lines.append))
    waiting = asyncio.create_task(outputs_of(engine, asking("waits", 2)))
    assert await asyncio.to_thread(begun.wait, 60)
    engine.stop()
    for task in (warming, waiting):
        with pytest.raises(EngineStoppedError, match="the engine has stopped"):
            await task
    assert re.fullmatch(r"given up after \d+\.\d s: the server is to stop", lines[0])
    engine.close()
    assert not engine._thread.is_alive()
    assert not caplog.records  # it is no failure


async def test_a_start_up_that_nobody_awaits_any_more_says_so(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, begun, stopped = make_engine(llm), threading.Event(), threading.Event()

    def warm_up(note: Callable[[str], None]) -> None:
        begun.set()
        assert stopped.wait(60)

    monkeypatch.setattr(engine._engine, "warm_up", warm_up)
    lines: list[str] = []
    warming = asyncio.create_task(engine.warm_up(lines.append))
    assert await asyncio.to_thread(begun.wait, 60)
    warming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await warming
    assert re.fullmatch(r"given up after \d+\.\d s: the server is to stop", lines[0])
    stopped.set()
    engine.close()


async def test_it_warms_up_in_the_thread_that_takes_its_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, threads = make_engine(llm), []
    step = engine._engine.step

    def warm_up(note: Callable[[str], None]) -> None:
        threads.append(threading.current_thread())
        note("half way")

    def watched() -> list:
        threads.append(threading.current_thread())
        return step()

    monkeypatch.setattr(engine._engine, "warm_up", warm_up)
    monkeypatch.setattr(engine._engine, "step", watched)
    lines: list[str] = []
    await engine.warm_up(lines.append)
    assert lines == ["half way"]
    assert set(threads) == {engine._thread}
    assert len(threads) > 1


async def test_how_long_an_output_waited_and_which_steps_there_were(llm: LLM) -> None:
    engine = make_engine(llm)
    before = engine.stats().steps
    outputs = await outputs_of(engine, asking("a", 3))
    assert 0 <= outputs[0].prompt.queue_s < 60
    assert engine.stats().steps >= before + 3


async def test_health_turns_red_whether_clients_wait_or_leave(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, goes_on = make_engine(llm), threading.Event()
    step = engine._engine.step

    def hanging() -> list:
        goes_on.wait()
        return step()

    monkeypatch.setattr(engine._engine, "step", hanging)
    async with client_of(engine, ServerSettings(stall_s=0.5)) as client:
        assert engine.stalled_s() == 0.0
        for _ in range(4):  # each gives up long before the engine counts as stalled
            assert (await chat(client, deadline_s=0.3)).status_code == 504
        assert (await client.get("/health")).json() == {"status": "stalled"}
        assert (await client.get("/ready")).status_code == 503
        goes_on.set()
        assert (await chat(client, max_tokens=3)).status_code == 200
        assert (await client.get("/health")).json() == {"status": "ok"}
        await settled(lambda: engine.stalled_s() == 0.0)


async def test_metrics_tell_what_requests_wait_for(llm: LLM) -> None:
    plan, limits = size_engine(llm.model, budget_bytes=1 << 20)
    # The sink, states, and pages of one request of full length.
    budget = (2 + CONTEXT // plan.page_tokens) * plan.layout.slab_bytes
    plan, limits = size_engine(llm.model, budget_bytes=budget)
    engine = BatchingEngine(TextModel(llm.model, llm.tokenizer), "tiny", plan, limits)
    async with client_of(engine) as client:
        first = engine.submit(asking("a", 500))
        await anext(first)
        second = asyncio.create_task(outputs_of(engine, asking("b", 300)))
        await settled(lambda: engine.stats().waiting.get("memory"))
        text = (await client.get("/metrics")).text
        await first.aclose()
        assert len(await second) == 300
    waiting = re.findall(r'^sevenfold_requests_waiting\{reason="(\w+)"\} (\S+)', text, re.M)
    assert dict(waiting) == {"turn": "0.0", "memory": "1.0", "max_running": "0.0",
        "max_prefills": "0.0", "max_step_tokens": "0.0"}  # fmt: skip


async def test_the_smallest_cacheable_prefix_is_the_smallest_that_hits(llm: LLM) -> None:
    for batch_invariant in (False, True):
        plan, limits = size_engine(llm.model, budget_bytes=1 << 20, batch_invariant=batch_invariant)
        engine = BatchingEngine(TextModel(llm.model, llm.tokenizer), "tiny", plan, limits)
        least = engine.stats().smallest_cacheable_prefix_tokens
        for shared, hit in ((least - 1, 0), (least, least)):
            for last in (1, 2, 3):
                prompt = (shared,) * shared + (last,) * 200
                [output] = await outputs_of(engine, asking(f"{shared} {last}", 1, prompt=prompt))
            assert output.prompt.cached_tokens == hit
        engine.close()


async def test_the_end_token_ends_an_answer(llm: LLM) -> None:
    async with client_of(make_engine(llm)) as client:
        made = await complete(client, prompt="a", max_tokens=9, logit_bias={str(EOS): 100})
    assert made["choices"][0]["finish_reason"] == "stop"
    assert made["usage"]["completion_tokens"] == 1


async def test_metrics_tell_what_the_host_s_memory_gave_back(llm: LLM) -> None:
    model = llm.model
    plan, limits = size_engine(model, budget_bytes=1 << 16, host_bytes=1 << 20)
    engine = BatchingEngine(TextModel(model, llm.tokenizer), "tiny", plan, limits)
    async with client_of(engine) as client:
        first = [n % 250 for n in range(130)]
        await complete(client, prompt=first, max_tokens=1)
        others = 0
        while engine.stats().host.kept < 2:  # others push it out
            others += 1
            assert others < 200
            await complete(client, prompt=[others, *first[1:]], max_tokens=1)
        before = engine.stats().host
        assert before.restored == 0
        await complete(client, prompt=[*first, 3], max_tokens=1)
        text = (await client.get("/metrics")).text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    values = {name.removeprefix("sevenfold_host_"): float(value) for name, value in found.items()}
    assert values["prefixes_restored_total"] == 1
    assert values["prefixes_kept_total"] >= 2
    assert values["restored_tokens_total"] == 128
    pages = 2 * plan.page_bytes if plan.page_bytes else 0
    assert values["restored_bytes_total"] >= plan.snapshot_bytes + pages
    assert found['sevenfold_pool_total{pool="host"}'] == str(float(plan.host.num_usable_slabs))
    assert float(found['sevenfold_pool_used{pool="host"}']) >= 1


async def test_without_memory_of_the_host_metrics_say_nothing_of_it(llm: LLM) -> None:
    async with client_of(make_engine(llm)) as client:
        assert "host" not in (await client.get("/metrics")).text
