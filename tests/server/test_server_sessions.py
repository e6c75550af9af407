"""The second turn of a chat, through HTTP: what is cached, and what a session keeps."""

import random

import httpx
import pytest
from server_helpers import chat, client_of, make_engine, message

from sevenfold.engine import LLM, TextModel
from sevenfold.engine.cache import SessionLimits
from sevenfold.engine.sizing import size_engine
from sevenfold.server import BatchingEngine

pytestmark = pytest.mark.anyio
SYSTEM = "You are a heron, grey and patient, and you answer in few words what you are asked."
FIRST = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "What do you see in the river this morning, and is it cold?"},
]


def small_engine(llm: LLM, **limits: int) -> BatchingEngine:
    """Memory for little more than one request of full length."""
    plan, config = size_engine(llm.model, budget_bytes=1 << 17)
    source = TextModel(llm.model, llm.tokenizer)
    return BatchingEngine(source, "tiny", plan, config, sessions=SessionLimits(**limits))


def found(response: httpx.Response) -> tuple[int, str | None]:
    details = response.json()["usage"]["prompt_tokens_details"]
    return details["cached_tokens"], details["cache_miss_reason"]


def second_turn(answer: str) -> list[dict]:
    said = {"role": "assistant", "content": answer}
    return [*FIRST, said, {"role": "user", "content": "And now?"}]


async def ask(client: httpx.AsyncClient, messages: list[dict], **fields) -> httpx.Response:
    response = await chat(client, messages=messages, **({"max_tokens": 24} | fields), seed=1)
    assert response.status_code == 200, response.text
    return response


async def crowd(client: httpx.AsyncClient, num: int) -> None:
    """Other conversations, more than memory keeps."""
    draw = random.Random(0)
    for _ in range(num):
        text = "".join(chr(draw.randrange(97, 123)) for _ in range(300))
        await ask(client, [{"role": "user", "content": text}], max_tokens=1)


async def test_the_second_turn_hits(llm: LLM) -> None:
    async with client_of(make_engine(llm)) as client:
        first = await ask(client, FIRST)
        assert found(first) == (0, "cold")
        answer = first.json()["choices"][0]["message"]["content"]
        prompt_tokens = first.json()["usage"]["prompt_tokens"]
        for said in (answer, "Something else: the template dropped what I thought."):
            cached, reason = found(await ask(client, second_turn(said)))
            assert cached >= prompt_tokens // 64 * 64 - 64
            assert reason is None
        metrics = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values["sevenfold_cache_hit_tokens_total"]) >= 2 * 64
    assert values['sevenfold_cache_misses_total{reason="cold"}'] == "1.0"
    assert float(values['sevenfold_pool_used{pool="snapshots"}']) >= 2
    for name in ("potential_tokens_total", "queried_tokens_total"):
        assert f"sevenfold_cache_{name}" in values
    for name in ("recomputed_tokens_total", "snapshots_evicted_total", "sessions"):
        assert f"sevenfold_{name}" in values
    assert values["sevenfold_smallest_cacheable_prefix_tokens"] == "64.0"


async def test_a_session_keeps_its_prefix_through_a_crowd(llm: LLM) -> None:
    hits = {}
    for session in (None, "mine"):
        fields = {} if session is None else {"session": session}
        async with client_of(small_engine(llm)) as client:
            await ask(client, FIRST, **fields)
            await crowd(client, 40)
            hits[session] = found(await ask(client, second_turn("Fish."), **fields))
            said = (await client.get("/metrics")).text
            assert f"sevenfold_sessions {float(session is not None)}" in said.splitlines()
    assert hits[None] == (0, "cold")
    assert hits["mine"][0] >= 64
    assert hits["mine"][1] is None


async def test_sessions_are_refused_where_none_are_kept(llm: LLM) -> None:
    async with client_of(small_engine(llm, max_sessions=0)) as client:
        response = await chat(client, session="mine")
        assert response.status_code == 400
        assert "session must be left out" in message(response)


async def test_bad_words(llm: LLM) -> None:
    async with client_of(make_engine(llm)) as client:
        plain = await ask(client, FIRST, temperature=0, max_tokens=60)
        text = plain.json()["choices"][0]["message"]["content"]
        word = next(text[n : n + 2] for n in range(len(text) - 2) if text[n : n + 2].isascii())
        other = await ask(client, FIRST, temperature=0, max_tokens=60, bad_words=[word])
        assert word not in other.json()["choices"][0]["message"]["content"]
