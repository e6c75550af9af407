"""Clients that nobody here wrote, against a server that listens: `openai`, schemathesis, fuzz."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pydantic
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_helpers import HELLO, KEY, ScriptedEngine, listening, make_engine

from sevenfold.engine import LLM
from sevenfold.server import (
    BatchingEngine,
    ServerApp,
    ServerSettings,
    TemplateSource,
)

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def openai_of(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def engine(llm: LLM) -> BatchingEngine:
    return make_engine(llm)


@pytest.fixture(scope="module")
def url(engine: BatchingEngine) -> Iterator[str]:
    with listening(engine) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai_of(url) as made:
        yield made


def test_openai_chat(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0.0}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert len(whole.choices[0].logprobs.content) == 12
    shown = b"".join(bytes(one.bytes) for one in whole.choices[0].logprobs.content)
    assert whole.choices[0].message.content == shown.decode("utf-8", "replace")
    options = {"include_usage": True}
    *parts, last = client.chat.completions.create(**fields, stream=True, stream_options=options)
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole.choices[0].message.content
    assert last.usage == whole.usage
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, seed=1)
    assert [choice.finish_reason for choice in made.choices] == ["length", "length"]
    assert made.usage.completion_tokens == 8


def test_openai_structured_output_and_tools(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema |= {"additionalProperties": False}
    made = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert list(json.loads(made.choices[0].message.content)) == ["yes"]


class Sight(pydantic.BaseModel):
    """What the client asks for as a class, and gets as an object of it."""

    bird: Literal["heron", "egret"]
    is_grey: bool


def test_openai_parses_what_the_grammar_made(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    fields = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "seed": 3}
    made = client.chat.completions.parse(**fields, response_format=Sight)
    assert isinstance(made.choices[0].message.parsed, Sight)
    with client.chat.completions.stream(**fields, response_format=Sight) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == (
            made.choices[0].message.parsed
        )
    schema = {"type": "object", "properties": {"at": {"enum": ["river"]}}, "required": ["at"]}
    schema |= {"additionalProperties": False}
    function = {"name": "look", "strict": True, "parameters": schema}
    tools = [{"type": "function", "function": function}]
    short = fields | {"max_tokens": 90}
    called = client.chat.completions.parse(**short, tools=tools, tool_choice="required")
    [call] = called.choices[0].message.tool_calls
    assert call.function.parsed_arguments == {"at": "river"}
    assert called.choices[0].finish_reason == "tool_calls"


def test_openai_repeats_what_found_the_queue_full() -> None:
    """The client waits as long as Retry-After says, and asks again by itself."""
    engine = ScriptedEngine("hello", wait_s=0.1)
    one = ServerSettings(port=0, api_keys=(KEY,), max_requests=1, max_choices=1)
    with (
        listening(engine, one) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=9, timeout=60) as client,
    ):

        def ask(_: int) -> str | None:
            made = client.chat.completions.create(model="scripted", messages=HELLO)
            return made.choices[0].message.content

        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(ask, range(3))) == ["hello"] * 3
        headers = {"Authorization": f"Bearer {KEY}"}
        lines = httpx.get(f"{address}/metrics", headers=headers).text.splitlines()
    route = 'sevenfold_http_responses_total{route="/v1/chat/completions",status='
    counts = {line.split('"')[3]: line.split()[-1] for line in lines if line.startswith(route)}
    assert counts["200"] == "3.0"
    assert float(counts["429"]) >= 1


def test_openai_tools_streamed() -> None:
    text = '<tool_calls>\n{"name": "look", "arguments": {"at": 1}}\n</tool_calls>'
    with (
        listening(ScriptedEngine(text, model_name="tiny")) as address,
        openai_of(address) as client,
    ):
        fields = {"model": "tiny", "messages": HELLO, "tools": [TOOL]}
        first = client.chat.completions.create(**fields).choices[0].message
        [call] = first.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": 1})
        # What the client got goes back as it is.
        answered = [*HELLO, first.model_dump(), {
            "role": "tool", "tool_call_id": call.id, "content": "7"}]  # fmt: skip
        again = client.chat.completions.create(**(fields | {"messages": answered}))
        assert again.choices[0].finish_reason == "tool_calls"
        with client.chat.completions.stream(**fields) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.name == "look"


def test_openai_errors(client: openai.OpenAI, url: str) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match=r"context of 512 tokens, got 22 \+ 600 = 622"):
        ask(model="tiny", messages=HELLO, max_tokens=600)
    with pytest.raises(openai.NotFoundError, match="model must be 'tiny'"):
        ask(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as raised:
        ask(model="tiny", messages=HELLO, extra_body={"session": ""})
    assert raised.value.param == "session"
    with openai_of(url, "w" * 20) as wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_openai_asynchronous_and_a_stream_left_early(url: str, engine: BatchingEngine) -> None:
    async def asking() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60
        ) as client:
            fields = {"model": "tiny", "messages": HELLO}
            fields |= {"extra_body": {"ignore_eos": True}}
            stream = await client.chat.completions.create(**fields, max_tokens=480, stream=True)
            async for _ in stream:
                break
            await stream.close()
            stream = await client.completions.create(
                model="tiny", prompt=[71, 72], max_tokens=5, stream=True, temperature=0
            )
            streamed = "".join([part.choices[0].text async for part in stream])
            whole = await client.completions.create(
                model="tiny", prompt=[71, 72], max_tokens=5, temperature=0
            )
            assert streamed == whole.choices[0].text
            made = await asyncio.gather(
                *(client.chat.completions.create(**fields, max_tokens=3) for _ in range(4))
            )
            return [one.usage.completion_tokens for one in made]

    assert asyncio.run(asking()) == [3] * 4
    for _ in range(500):
        if not engine.stats().running:
            break
        time.sleep(0.01)
    assert (engine.stats().running, sum(engine.stats().waiting.values())) == (0, 0)


short = st.text(max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
names = st.sampled_from(
    ["messages", "prompt", "max_tokens", "temperature", "top_k", "stop", "n", "seed", "logit_bias",
     "stream", "tools", "tool_choice", "response_format", "logprobs", "echo", "model", "tokens",
     "stream_options", "min_tokens", "deadline_s", "cache_salt"]
)  # fmt: skip


@pytest.fixture(scope="module")
def scripted_url() -> Iterator[str]:
    with listening(ScriptedEngine("hello")) as address:
        yield address


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(["chat/completions", "completions", "../tokenize", "../detokenize"]),
    fields=st.dictionaries(names, values, max_size=4),
    well_formed=st.booleans(),
    broken=st.binary(max_size=12) | st.none(),
)
def test_fuzzed_bodies(
    scripted_url: str, path: str, fields: dict, well_formed: bool, broken: bytes | None
) -> None:
    base = {"messages": HELLO, "prompt": "a"} if well_formed else {}
    body = json.dumps(base | fields).encode()
    response = httpx.post(
        f"{scripted_url}/v1/{path}",
        content=body if broken is None else broken + body[len(broken) :],
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        timeout=30,
    )
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
document = schemathesis.openapi.from_dict(
    ServerApp(ScriptedEngine(), ServerSettings(), TemplateSource()).api.openapi()
)


@document.parametrize()
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_the_openapi_is_kept(case: schemathesis.Case, scripted_url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    response = case.call(base_url=scripted_url, headers=headers, timeout=30)
    if "text/event-stream" in str(response.headers.get("content-type")):
        return  # what a stream holds is no matter of the document
    if response.status_code == 504:
        return  # it asked for a deadline that nobody can keep
    case.validate_response(response, checks=CHECKS)
