"""Many requests at once, whose clients leave, wait too shortly or stay: nothing is left behind."""

import asyncio
import random

import pytest
from server_helpers import HELLO, ScriptedEngine, chat, client_of, disconnecting
from soak_helpers import soak

from sevenfold.server import ServerSettings

pytestmark = pytest.mark.anyio
TEXT = "nine grey herons stood quite still"


@pytest.mark.parametrize("num", [120, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_nothing_is_left_behind(num: int) -> None:
    engine = ScriptedEngine(TEXT)
    chance = random.Random(0)
    room = asyncio.Semaphore(40)
    served = 0

    async def one(client, kind: str, after: int) -> None:
        nonlocal served
        async with room:
            if kind == "leaves":
                await disconnecting(client.app, {"messages": HELLO, "stream": True, "n": 2}, after)
            elif kind == "hurries":
                response = await chat(client, deadline_s=after * 1e-4)
                assert response.status_code in (200, 504)
            else:
                response = await chat(client, n=2)
                texts = [c["message"]["content"] for c in response.json()["choices"]]
                assert texts == [TEXT, TEXT]
                served += 1

    async with client_of(engine, ServerSettings(max_requests=128)) as client:
        kinds = [chance.choice(("leaves", "hurries", "stays")) for _ in range(num)]
        await asyncio.gather(*(one(client, kind, chance.randint(1, 30)) for kind in kinds))
        assert served == kinds.count("stays")
        assert (client.app.service.desk.under_way, engine.under_way) == (0, 0)
        assert engine.cancelled > 0
        lines = (await client.get("/metrics")).text.splitlines()
    ended = [float(one.split()[-1]) for one in lines if one.startswith("sevenfold_outputs_total{")]
    assert sum(ended) == len(engine.asked)


@pytest.mark.parametrize("num", [120, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_the_engine_answers_all_as_each_alone_and_frees_everything(num: int) -> None:
    counts = await soak(num)
    assert counts["answers compared"] >= counts["stays"] > 0
    assert counts["leaves"] > 0
    assert counts["hurries"] > 0
    assert counts["cached_tokens"] > 0
