"""/v1/completions, /tokenize and /detokenize."""

import pytest
from server_helpers import ScriptedEngine, client_of, events, message

from sevenfold.server import ServerSettings

pytestmark = pytest.mark.anyio


async def test_marks_are_handed_on() -> None:
    engine = ScriptedEngine()
    body = {"prompt": ["hello there", "hello you"], "cache_marks": [2, 6], "max_tokens": 1}
    async with client_of(engine) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert [asked.marks for asked in engine.asked] == [(2, 6), (2, 6)]
        for marks in ([6, 2], [2, 2], [2, 10]):
            response = await client.post("/v1/completions", json=body | {"cache_marks": marks})
            assert response.status_code == 400
            assert "cache_marks must rise and be at most the prompt's" in message(response)
        for marks in ([0], [1, 2, 3, 4, 5], 3):
            response = await client.post("/v1/completions", json=body | {"cache_marks": marks})
            assert response.status_code == 400
            assert "cache_marks" in message(response)


async def complete(client, **fields):
    return await client.post("/v1/completions", json=fields)


async def test_prompts_of_every_form() -> None:
    engine = ScriptedEngine("abcd")
    async with client_of(engine) as client:
        for prompt in ("hi", ["hi"], [71, 72], [[71, 72]]):
            response = await complete(client, prompt=prompt, max_tokens=3)
            assert response.status_code == 200, response.text
            [choice] = response.json()["choices"]
            assert choice == {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}
        several = (await complete(client, prompt=["a", "bcd"], n=2, echo=True)).json()
    assert [c["text"] for c in several["choices"]] == ["aabcd", "aabcd", "bcdabcd", "bcdabcd"]
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 16,
        "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 6, "cache_miss_reason": "no_state"},
    }
    assert engine.asked[0].sampling.stop == ()
    assert [one.sampling.max_tokens for one in engine.asked[-4:]] == [16] * 4


async def test_a_stream() -> None:
    async with client_of(ScriptedEngine("abcd")) as client:
        options = {"include_usage": True}
        response = await complete(client, prompt="hi", stream=True, stream_options=options)
    *parts, last = events(response)
    assert [c["text"] for part in parts for c in part["choices"]] == list("abcd")
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt must be given"),
        ({"prompt": ""}, "prompt must have at least one token"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [257]}, "prompt must hold tokens below 257, got 257"),
        ({"prompt": "a", "max_tokens": 512}, "got 1 + 512 = 513"),
        ({"prompt": ["a"] * 9}, "prompts must be at most 8, got 9"),
        ({"prompt": ["a"] * 3, "n": 3}, "prompts times n must be at most 8, got 9"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo with logprobs must be left out"),
        ({"prompt": "a", "suffix": "b"}, "suffix must be valid"),
        ({"prompt": "a", "best_of": 4}, "best_of must be valid"),
    ],
)
async def test_what_is_refused(fields: dict, said: str) -> None:
    engine = ScriptedEngine()
    async with client_of(engine, ServerSettings(max_choices=8)) as client:
        response = await complete(client, **fields)
    assert response.status_code == 400, response.text
    assert said in message(response)
    assert engine.asked == []


async def test_tokens_of_texts_and_back() -> None:
    async with client_of(ScriptedEngine()) as client:
        text = "naïve <|end|>"
        made = (await client.post("/tokenize", json={"prompt": text})).json()
        assert made["count"] == len(made["tokens"]) == len("naïve ".encode()) + 1
        assert made["max_model_len"] == 512
        back = await client.post("/detokenize", json={"tokens": made["tokens"]})
        assert back.json() == {"prompt": text}
        for path, body in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
            ("/tokenize", {"prompt": "a", "tools": []}),
            ("/detokenize", {"tokens": [300]}),
            ("/detokenize", {"tokens": [-1]}),
        ):
            assert (await client.post(path, json=body)).status_code == 400
