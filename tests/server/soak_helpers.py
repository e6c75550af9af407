"""Many requests at a tiny model through the whole server, whose clients leave, hurry or stay."""

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
from server_helpers import client_of, disconnecting, make_llm

from sevenfold.engine import LLM, SamplingParams, TextModel
from sevenfold.engine.cache import SessionLimits
from sevenfold.engine.engine import Engine
from sevenfold.engine.request import Request
from sevenfold.engine.sizing import size_engine
from sevenfold.server import BatchingEngine, ServerSettings

NUM_CASES = 40
AT_A_TIME = 48
MEMORY_BYTES = 1 << 18  # for a few requests of full length: much must wait, and be evicted
Body = dict[str, Any]


def bodies(seed: int) -> list[Body]:
    """What is asked: prompts of 1 to 300 tokens, many with a beginning in common."""
    draw = random.Random(seed)
    shared = [draw.randrange(256) for _ in range(150)]
    made = []
    for n in range(NUM_CASES):
        own = [draw.randrange(256) for _ in range(draw.randint(1, 150))]
        asked: Body = {"prompt": shared[: draw.choice((0, 70, 150))] + own}
        asked |= {"max_tokens": draw.randint(1, 24), "ignore_eos": True}
        asked |= {"temperature": 0} if n % 2 else {"seed": n, "top_p": 0.9}
        made.append(asked)
    return made


def answers_alone(llm: LLM, asked: list[Body]) -> list[str]:
    """What each request gets when nothing else runs and nothing is cached."""
    plan, limits = size_engine(llm.model, budget_bytes=MEMORY_BYTES)
    engine = Engine(llm.model, llm.tokenizer, plan, limits)
    texts = []
    for n, body in enumerate(asked):
        params = SamplingParams(**{k: v for k, v in body.items() if k != "prompt"})
        engine.submit(Request(str(n), tuple(body["prompt"]), params.max_tokens), params)
        texts.append("")
        while engine.has_work:
            texts[-1] += "".join(event.text for event in engine.step())
        engine.cache.clear()
    return texts


async def soak(num_requests: int, seed: int = 0) -> dict[str, Any]:
    """Ask so many times; check every answer, and that nothing is left when all have ended.

    Returns:
        Counts, for a record.
    """
    llm, asked = make_llm(), bodies(seed)
    alone = answers_alone(llm, asked)
    plan, limits = size_engine(llm.model, budget_bytes=MEMORY_BYTES)
    source = TextModel(llm.model, llm.tokenizer)
    engine = BatchingEngine(source, "tiny", plan, limits, sessions=SessionLimits(max_sessions=8))
    idle = engine._engine.cache.usage()
    draw, room, counts = random.Random(seed + 1), asyncio.Semaphore(AT_A_TIME), Counter[str]()

    async def one(client: httpx.AsyncClient) -> None:
        async with room:
            n = draw.randrange(NUM_CASES)
            body = asked[n] | ({"session": str(draw.randrange(16))} if draw.random() < 0.3 else {})
            body |= {"priority": draw.randrange(3)}
            kind = draw.choice(("stays", "stays", "leaves", "hurries"))
            counts[kind] += 1
            if kind == "leaves":
                body |= {"stream": True}
                await disconnecting(client.app, body, draw.randint(0, 20), "/v1/completions")
                return
            if kind == "hurries":
                body |= {"deadline_s": draw.uniform(1e-4, 0.2)}
            response = await client.post("/v1/completions", json=body)
            if kind == "hurries" and response.status_code == 504:
                counts["too late"] += 1
                return
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == alone[n]
            counts["answers compared"] += 1

    async with client_of(engine, ServerSettings(max_requests=256)) as client:
        await asyncio.gather(*(one(client) for _ in range(num_requests)))
        assert client.app.service.desk.under_way == 0
    stats = engine.stats()
    left = engine._engine
    while left.has_work:  # what was cancelled last ends here: the thread has stopped
        left.step()
    assert (left.scheduler.num_waiting, left.scheduler.num_decoding) == (0, 0)
    assert left.cache.usage().num_items[0] == 0, "no state is held"
    left.cache.clear()
    assert left.cache.usage() == idle, "no page, state or snapshot is left"
    counters = left.counters()
    return dict(counts) | {
        "requests": num_requests,
        "cached_tokens": counters.hit_tokens,
        "prompt_tokens": counters.query_tokens,
        "snapshots_evicted": counters.num_evicted,
        "preemptions": stats.preemptions,
        "items_left": 0,
    }
