"""/v1/chat/completions: what it asks of the engine, and how it tells the answer."""

import json

import pytest
from server_helpers import (
    CONTEXT,
    HELLO,
    VOCAB_SIZE,
    ScriptedEngine,
    chat,
    client_of,
    events,
    message,
    streamed,
)

from sevenfold.server import ServerSettings, TemplateSource

pytestmark = pytest.mark.anyio
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


async def test_an_answer() -> None:
    engine = ScriptedEngine()
    async with client_of(engine) as client:
        response = await chat(client, model="scripted")
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "scripted"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "hello there",
                "reasoning_content": None,
                "tool_calls": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    [asked] = engine.asked
    prompt = "User: hello\nAssistant:"
    assert engine.tokenizer.decode(list(asked.prompt)) == prompt
    assert asked.marks == (len("User: hello\n"),)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 11,
        "total_tokens": len(prompt) + 11,
        "prompt_tokens_details": {"cached_tokens": 3, "cache_miss_reason": "no_state"},
    }
    assert asked.sampling.max_tokens == CONTEXT - len(prompt)
    assert asked.sampling.stop == ("\nUser:", "\nSystem:")


async def test_a_stream_says_the_same() -> None:
    async with client_of(ScriptedEngine()) as client:
        options = {"include_usage": True}
        response = await chat(client, stream=True, stream_options=options, n=2)
        whole = (await chat(client, n=2)).json()
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = events(response)
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    for n in range(2):
        assert streamed(parts, n) == "hello there"
        reasons = [c["finish_reason"] for p in parts for c in p["choices"] if c["index"] == n]
        assert [reason for reason in reasons if reason] == ["stop"]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 22


async def test_usage_with_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with client_of(ScriptedEngine()) as client:
        parts = events(await chat(client, stream=True, stream_options=options))
        body = {"prompt": "hello", "stream": True, "stream_options": options}
        more = events(await client.post("/v1/completions", json=body))
    for told in (parts, more):
        counts = [part["usage"]["completion_tokens"] for part in told]
        assert counts == sorted(counts)
        assert counts[-1] == 11
        assert set(counts) >= set(range(1, 12))
        assert told[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


# What vllm-router 0.1.17 made of a chat request with nothing but model and messages.
ROUTED = {"no_stop_trim": False, "ignore_eos": False, "continue_final_message": False,
    "skip_special_tokens": True, "separate_reasoning": True, "stream_reasoning": True,
    "return_hidden_states": False, "include_reasoning": True, "logprobs": False,
    "stream": False}  # fmt: skip


async def test_what_routers_write_into_bodies_is_taken_where_it_changes_nothing() -> None:
    template = TemplateSource("{{ messages[0].reasoning_content }}/", stop=())
    thought = [{"role": "assistant", "content": "x", "reasoning": "hm"}]
    engine = ScriptedEngine()
    async with client_of(engine, template=template) as client:
        assert (await chat(client, **ROUTED)).status_code == 200
        assert (await chat(client, messages=thought)).status_code == 200
        asked = {"messages": thought, "continue_final_message": False}
        tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
        for name, value in ROUTED.items():
            if name not in ("stream", "ignore_eos", "logprobs"):
                response = await chat(client, **{name: not value})
                assert response.status_code == 400
                assert f"{name} must be valid: Input should be {value}" in message(response)
        both = [thought[0] | {"reasoning_content": "else"}]
        said = message(await chat(client, messages=both))
    assert said == "messages.0.reasoning must be reasoning_content if both are given"
    assert engine.tokenizer.decode(tokens) == "hm/"
    assert tokens == list(engine.asked[1].prompt)


async def test_sampling_reaches_the_engine() -> None:
    engine = ScriptedEngine()
    fields = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "logit_bias": {"5": 2, "6": -100},
        "bad_words": ["c"],
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "min_tokens": 2,
        "ignore_eos": True,
        "seed": -1,
        "max_completion_tokens": 5,
        "logprobs": True,
        "top_logprobs": 3,
        "n": 3,
        "deadline_s": 9.5,
    }
    async with client_of(engine, template=TemplateSource(stop=())) as client:
        response = await chat(client, **fields)
    assert response.status_code == 200, response.text
    first, second, third = (one.sampling for one in engine.asked)
    assert first.model_dump() == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "logit_bias": {5: 2.0, 6: -100.0},
        "bad_words": ("c",),
        "stop": ("a", "b"),
        "stop_token_ids": (9,),
        "min_tokens": 2,
        "seed": 2**64 - 1,
        "ignore_eos": True,
        "logprobs": 3,
        "prompt_logprobs": None,
    }
    assert (second.seed, third.seed) == (0, 1)
    assert {one.deadline_s for one in engine.asked} == {9.5}
    assert len({one.id for one in engine.asked}) == 3


async def test_at_temperature_zero_what_changes_nothing_is_left_out() -> None:
    engine = ScriptedEngine()
    async with client_of(engine) as client:
        response = await chat(client, temperature=0, top_p=1, seed=1234, top_k=-1, min_p=0.0)
    assert response.status_code == 200
    sampling = engine.asked[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.0, None, None)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"messages": []}, 400, "messages must be valid"),
        ({"messages": [{"role": "user"}] * 5}, 400, "messages must be at most 4, got 5"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role must be valid"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                    }
                ]
            },
            400,
            "Input should be 'text'",
        ),
        ({"frobnicate": 1}, 400, "frobnicate is not a parameter that this server knows"),
        ({"temperature": -1}, 400, "temperature must be valid"),
        ({"temperature": 0.001}, 400, "temperature must be 0 or at least 0.01, got 0.001"),
        ({"temperature": "1"}, 400, "temperature must be valid"),
        ({"n": 17}, 400, "n must be valid"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": "x" * 257}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"logit_bias": {"257": 1}}, 400, f"must name tokens below {VOCAB_SIZE}, got 257"),
        ({"stop_token_ids": [300]}, 400, f"must name tokens below {VOCAB_SIZE}, got 300"),
        ({"top_logprobs": 2}, 400, "top_logprobs must be left out without logprobs"),
        ({"stream_options": {}}, 400, "stream_options must be left out without stream"),
        ({"min_tokens": 9, "max_tokens": 5}, 400, "min_tokens must be at most max_tokens = 5"),
        ({"deadline_s": 7200}, 400, "deadline_s must be at most 3600, got 7200"),
        ({"model": "gpt-9"}, 404, "model must be 'scripted', which alone is served, got 'gpt-9'"),
        ({"priority": 1}, 400, "priority must be left out: the engine"),
        ({"session": "a"}, 400, "session must be left out: the engine"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format must be left out"),
        ({"tools": [TOOL], "tool_choice": "required"}, 400, "tools must be left out: the engine"),
        ({"tool_choice": "auto"}, 400, "tools must be given for tool_choice auto"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "go"}},
            },
            400,
            "tool_choice must name one of tools, got 'go'",
        ),
        (
            {"max_tokens": 500},
            400,
            f"must fit into the model's context of {CONTEXT} tokens, got 22 + 500 = 522",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            400,
            f"must fit into the model's context of {CONTEXT} tokens, got 617 + 1 = 618",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "look", "arguments": "[1]"}}
                        ],
                    }
                ]
            },
            400,
            "messages.0.tool_calls: arguments must be a JSON object as text",
        ),
    ],
)
async def test_what_is_refused(fields: dict, status: int, said: str) -> None:
    engine = ScriptedEngine()
    async with client_of(engine, ServerSettings(max_messages=4)) as client:
        response = await chat(client, **fields)
    assert response.status_code == status, response.text
    assert said in message(response)
    assert engine.asked == []


async def test_text_far_beyond_the_context_is_refused_before_it_is_encoded() -> None:
    long = [{"role": "user", "content": "x" * 50_000}]
    async with client_of(ScriptedEngine()) as client:
        response = await chat(client, messages=long)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert f"context of {CONTEXT} tokens, got 50017 characters" in message(response)


async def test_reasoning_is_told_apart() -> None:
    engine = ScriptedEngine("<think>let me see</think>\n\nfour")
    async with client_of(engine) as client:
        whole = (await chat(client)).json()["choices"][0]["message"]
        parts = events(await chat(client, stream=True))
    assert (whole["reasoning_content"], whole["content"]) == ("let me see", "four")
    assert streamed(parts, 0, "reasoning_content") == "let me see"
    assert streamed(parts, 0) == "four"


async def test_a_prompt_that_opens_the_reasoning() -> None:
    template = TemplateSource("{{ messages[0].content }}<think>\n", stop=())
    async with client_of(ScriptedEngine("hm</think>four"), template=template) as client:
        whole = (await chat(client)).json()["choices"][0]["message"]
    assert (whole["reasoning_content"], whole["content"]) == ("hm", "four")


CALLS = 'so\n<tool_calls>\n{"name": "look", "arguments": {"at": "x"}}\n'
CALLS += '{"name": "look", "arguments": {}}\n</tool_calls>'


async def test_tool_calls() -> None:
    engine = ScriptedEngine(CALLS)
    async with client_of(engine) as client:
        whole = (await chat(client, tools=[TOOL])).json()["choices"][0]
        parts = events(await chat(client, tools=[TOOL], stream=True))
        none = (await chat(client, tools=[TOOL], tool_choice="none")).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "so"
    calls = [
        (c["function"]["name"], c["function"]["arguments"]) for c in whole["message"]["tool_calls"]
    ]
    assert calls == [("look", '{"at": "x"}'), ("look", "{}")]
    deltas = [c["delta"] for part in parts for c in part["choices"]]
    told = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(c["index"], c["function"]["arguments"]) for c in told] == [
        (0, '{"at": "x"}'),
        (1, "{}"),
    ]
    assert len({c["id"] for c in told}) == 2
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert none["message"]["content"] == CALLS
    assert none["finish_reason"] == "stop"
    shown, _, hidden = (engine.tokenizer.decode(list(one.prompt)) for one in engine.asked)
    assert shown.startswith("Tools: ")
    assert hidden.startswith("User: ")


async def test_one_call_at_most_ends_the_output() -> None:
    engine = ScriptedEngine(CALLS)
    async with client_of(engine) as client:
        response = await chat(client, tools=[TOOL], parallel_tool_calls=False)
    [choice] = response.json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert response.json()["usage"]["completion_tokens"] < len(CALLS)
    assert (engine.under_way, engine.cancelled) == (0, 1)


async def test_a_template_without_a_place_for_tools() -> None:
    template = TemplateSource("{{ messages[0].content }}")
    async with client_of(ScriptedEngine(), template=template) as client:
        response = await chat(client, tools=[TOOL])
    assert response.status_code == 400
    assert "the model's chat template has no place for them" in message(response)


async def test_earlier_calls_and_their_results_reach_the_prompt() -> None:
    engine = ScriptedEngine()
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "nothing"},
    ]
    async with client_of(engine) as client:
        response = await chat(client, messages=messages)
        tokens = (await client.post("/tokenize", json={"messages": messages})).json()
    assert response.status_code == 200, response.text
    prompt = engine.tokenizer.decode(list(engine.asked[0].prompt))
    assert prompt.startswith("System: a\nb\nUser: hello\nAssistant: ")
    assert json.dumps({"name": "look", "arguments": {"at": "é"}}, ensure_ascii=False) in prompt
    assert prompt.endswith("Tool: nothing\nAssistant:")
    assert tokens["tokens"] == list(engine.asked[0].prompt)
    ends = [prompt.encode()[:mark].decode() for mark in engine.asked[0].marks]
    assert len(ends) == 4
    assert ends[0].startswith("System: a\nb")
    assert "User" not in ends[0]
    assert ends[1].rstrip().endswith("User: hello")
    assert ends[2].rstrip().endswith("</tool_calls>")
    assert ends[3].rstrip().endswith("Tool: nothing")


def conversation(num: int, text: str = "word") -> list[dict]:
    """A system prompt and messages that take turns, each with its number."""
    roles = ("user", "assistant")
    told = [{"role": roles[n % 2], "content": f"{text} {n}."} for n in range(1, num)]
    return [{"role": "system", "content": f"{text} 0."}, *told]


async def ends_of(engine: ScriptedEngine, messages: list[dict], **of_client) -> list[str]:
    """The ends of what lies before each mark that the engine gets."""
    async with client_of(engine, **of_client) as client:
        response = await chat(client, messages=messages)
    assert response.status_code == 200, response.text
    asked = engine.asked[-1]
    return [engine.tokenizer.decode(list(asked.prompt[:mark])).rstrip() for mark in asked.marks]


async def test_turns_are_marked_1_2_4_8_and_so_on_from_the_end() -> None:
    engine = ScriptedEngine(max_context_tokens=20_000)
    ends = await ends_of(engine, conversation(26))
    assert [end.rpartition(" ")[2] for end in ends] == [
        "0.",
        "9.",
        "17.",
        "21.",
        "23.",
        "24.",
        "25.",
    ]
    # However long it is, few prefixes are rendered.
    ends = await ends_of(engine, conversation(600))
    assert [end.rpartition(" ")[2] for end in ends] == [
        "0.", "535.", "567.", "583.", "591.", "595.", "597.", "598.", "599."]  # fmt: skip


MARK = {"cache_control": {"type": "ephemeral"}}


async def test_callers_mark_where_other_requests_leave() -> None:
    engine = ScriptedEngine(max_context_tokens=10_000)
    messages = conversation(26)
    messages[5] |= MARK
    parts = [{"type": "text", "text": "long"} | MARK, {"type": "text", "text": "short"}]
    messages[12] = {"role": "user", "content": parts}
    ends = await ends_of(engine, messages)
    assert len(ends) == 9
    assert ends[1].endswith("word 5.")
    assert ends[3].endswith("User: long")  # and not the rest of the message
    templates = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }},{% endfor %};{% endfor %}",
        "{% for m in messages %}<{{ m.content }}>{% endfor %}",
    )
    for text, expected in zip(templates, ("long,", "<long"), strict=True):
        template = TemplateSource(text, stop=())
        told = [{"role": "user", "content": parts}]
        assert (await ends_of(engine, told, template=template))[0] == expected


async def test_marks_of_callers_that_are_refused() -> None:
    async with client_of(ScriptedEngine()) as client:
        many = [message | MARK for message in conversation(5)]
        response = await chat(client, messages=many)
        assert response.status_code == 400
        assert message(response) == "cache_control must be given 4 times at most, got 5"
        for mark in ({"type": "lasting"}, {"type": "ephemeral", "ttl": "1h"}, True):
            response = await chat(client, messages=[HELLO[0] | {"cache_control": mark}])
            assert response.status_code == 400
            assert "cache_control" in message(response)
