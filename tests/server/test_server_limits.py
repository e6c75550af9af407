"""Keys, limits, queue, deadlines, clients that leave, draining, health."""

import asyncio
import base64
import json
from importlib.metadata import version
from typing import Any

import pytest
from server_helpers import (
    HELLO,
    VOCAB_SIZE,
    ScriptedEngine,
    chat,
    client_of,
    disconnecting,
    message,
    post_scope,
    settled,
)

from sevenfold.config import ConfigError, parse_config
from sevenfold.server import (
    EngineFullError,
    EngineStoppedError,
    PromptOutput,
    RequestFailedError,
    ServerSettings,
    runs,
)
from sevenfold.server.keys import ANYONE, KeyRing

pytestmark = pytest.mark.anyio
KEY, OTHER_KEY = "k" * 20, "other" * 5
KEYS = ServerSettings(api_keys=(KEY, OTHER_KEY))
EVERYWHERE = ["/", "/docs", "/openapi.json", "/v1/models", "/ready", "/metrics", "/nowhere"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_keys_guard_everything_but_health() -> None:
    engine = ScriptedEngine()
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    async with client_of(engine, KEYS) as client:
        assert (await client.get("/health")).status_code == 200
        for wrong in ({}, bearer("k" * 19), bearer(""), {"Authorization": "Basic %%%"}):
            for path in EVERYWHERE:
                response = await client.get(path, headers=wrong)
                assert response.status_code == 401
                assert "a valid API key must come with the request" in message(response)
                scheme = "Basic" if path in ("/", "/docs") else "Bearer"
                assert response.headers["www-authenticate"].startswith(scheme)
            assert (
                await client.post("/v1/chat/completions", json={}, headers=wrong)
            ).status_code == 401
        for right in (bearer(KEY), bearer(OTHER_KEY), {"Authorization": f"Basic {basic}"}):
            assert (await client.get("/v1/models", headers=right)).status_code == 200
            assert (await client.get("/", headers=right)).status_code == 200
    assert engine.asked == []


ADMIN = "admin" * 4


async def test_metrics_and_the_cache_are_for_admins_where_there_are_some() -> None:
    engine = ScriptedEngine()
    keys = ServerSettings(api_keys=(KEY,), admin_keys=(ADMIN,))
    async with client_of(engine, keys) as client:

        async def statuses(key: str) -> list[int]:
            client.headers = bearer(key)
            reset = await client.post("/reset_prefix_cache", json={})
            asked = [reset, await client.get("/metrics"), await client.get("/v1/models")]
            return [one.status_code for one in asked]

        assert await statuses(KEY) == [403, 403, 200]
        assert engine.forgotten == 0
        assert await statuses(ADMIN) == [200, 200, 200]
        assert engine.forgotten == 1
        text = (await client.get("/metrics")).text
        assert 'sevenfold_prefix_misses_total{reason="other_salt"} 2.0' in text
        foreign = await client.post("/reset_prefix_cache", content=b"{}")
        assert (foreign.status_code, engine.forgotten) == (415, 1)


async def test_callers_who_may_all_read_the_metrics_learn_nothing_of_each_other() -> None:
    async with client_of(ScriptedEngine(), KEYS, headers=bearer(KEY)) as client:
        text = (await client.get("/metrics")).text
    assert "other_salt" not in text
    assert 'sevenfold_prefix_misses_total{reason="no_kv"} 5.0' in text


async def test_salts_come_from_keys_and_only_split_further() -> None:
    engine = ScriptedEngine()
    async with client_of(engine, KEYS) as client:
        for key, own in ((KEY, None), (KEY, "a"), (OTHER_KEY, None), (OTHER_KEY, "a"), (KEY, None)):
            client.headers = bearer(key)
            assert (await chat(client, cache_salt=own)).status_code == 200
    salts = [one.salt for one in engine.asked]
    assert len(set(salts[:4])) == 4
    assert salts[4] == salts[0]
    assert KEY.encode() not in b"".join(salts)
    assert KeyRing(()).caller(None) is ANYONE


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9"}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
    ],
)
async def test_other_sites_may_not_ask(headers: dict, status: int) -> None:
    async with client_of(ScriptedEngine()) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == status


async def test_bodies_are_json_of_bounded_size() -> None:
    settings = ServerSettings(max_body_bytes=200)
    url = "/v1/chat/completions"
    async with client_of(ScriptedEngine(), settings) as client:
        long = {"messages": [{"role": "user", "content": "x" * 200}]}
        response = await client.post(url, json=long)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert "at most 200 bytes" in message(response)

        async def pieces():
            for _ in range(30):
                yield b'{"messages":'

        json_type = {"Content-Type": "application/json"}
        response = await client.post(url, content=pieces(), headers=json_type)
        assert response.status_code == 413
        for kind in ("text/plain", "multipart/form-data", ""):
            body = b'{"messages": []}'
            response = await client.post(url, content=body, headers={"Content-Type": kind})
            assert response.status_code == 415
        for body in (b"", b"{", b"[]", b"NaN", b'"a"', b"\xff", b'{"a":"\\ud800"}', b"[" * 150):
            response = await client.post(url, content=body, headers=json_type)
            assert response.status_code == 400, body
            assert message(response)


async def test_a_body_that_does_not_arrive() -> None:
    async with client_of(ScriptedEngine(), ServerSettings(body_timeout_s=0.2)) as client:
        sent: list[dict[str, Any]] = []
        scope = post_scope("/v1/chat/completions")
        begun = [{"type": "http.request", "body": b'{"messages":', "more_body": True}]

        async def receive() -> dict[str, Any]:
            if begun:
                return begun.pop()
            return await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(said: dict[str, Any]) -> None:
            sent.append(said)

        await asyncio.wait_for(client.app(scope, receive, send), 30)
    assert sent[0]["status"] == 408
    assert b"the body must arrive within 0.2 s" in sent[1]["body"]


async def test_a_client_that_does_not_read_holds_no_place_beyond_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "_GRACE_S", 0.1)
    engine = ScriptedEngine()
    async with client_of(engine) as client:
        body = {"messages": HELLO, "stream": True, "deadline_s": 0.3}
        inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            return inbox.pop() if inbox else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(said: dict[str, Any]) -> None:
            if said["type"] == "http.response.body":
                await asyncio.Event().wait()  # the socket's buffer is full

        scope = post_scope("/v1/chat/completions")
        await asyncio.wait_for(client.app(scope, receive, send), 30)
        assert client.app.service.desk.under_way == 0
    assert engine.under_way == 0


async def test_a_full_queue_says_when_to_come_back() -> None:
    engine = ScriptedEngine(stall_after=1)
    settings = ServerSettings(max_requests=2, max_choices=2)
    async with client_of(engine, settings) as client:
        waiting = asyncio.create_task(chat(client, n=2, deadline_s=1.0))
        await settled(lambda: engine.under_way == 2)
        response = await chat(client)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["code"] == "queue_full"
        assert (await waiting).status_code == 504
        engine.stall_after = None
        assert (await chat(client)).status_code == 200
        assert client.app.service.desk.under_way == 0


async def test_a_deadline_ends_the_request_and_frees_the_engine() -> None:
    engine = ScriptedEngine(stall_after=2)
    async with client_of(engine) as client:
        response = await chat(client, deadline_s=0.2)
        assert response.status_code == 504
        assert "must end within its deadline of 0.2 s" in message(response)
        assert response.headers["x-should-retry"] == "false"
        assert (engine.under_way, engine.cancelled) == (0, 1)
        stream = await chat(client, deadline_s=0.2, stream=True)
        assert '"code": "deadline_exceeded"' in stream.text.split("\n\n")[-2]
        assert "[DONE]" not in stream.text
        assert (engine.under_way, engine.cancelled) == (0, 2)
        text = (await client.get("/metrics")).text
    assert 'sevenfold_outputs_total{reason="deadline"} 2.0' in text


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RequestFailedError("logits are not finite"), 500, "logits are not finite"),
        (EngineFullError("full"), 429, "too many requests are waiting"),
        (EngineStoppedError("the engine has stopped"), 503, "the engine has stopped"),
        (ZeroDivisionError("secret"), 500, "the server failed on this request"),
    ],
)
async def test_an_engine_that_fails_one_request(error: Exception, status: int, said: str) -> None:
    engine = ScriptedEngine(stall_after=1, error=error)
    async with client_of(engine) as client:
        response = await chat(client, n=2)
        assert response.status_code == status
        assert said in message(response)
        assert "secret" not in response.text
        assert said in (await chat(client, stream=True)).text
        engine.stall_after = None
        assert (await chat(client)).status_code == 200
        assert client.app.service.desk.under_way == 0
    assert engine.under_way == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_outputs(stream: bool) -> None:
    engine = ScriptedEngine(stall_after=3)
    async with client_of(engine) as client:
        body = {"messages": HELLO, "n": 2, "stream": stream}
        sent = await disconnecting(client.app, body, after=3 if stream else 0)
        assert (engine.under_way, engine.cancelled) == (0, 2)
        assert client.app.service.desk.under_way == 0
        text = (await client.get("/metrics")).text
    assert (sent[0]["status"] == 200) is stream
    assert 'sevenfold_outputs_total{reason="cancelled"} 2.0' in text


async def test_draining_ends_what_is_under_way_and_takes_no_more() -> None:
    engine = ScriptedEngine(wait_s=0.02)
    async with client_of(engine) as client:
        under_way = asyncio.create_task(chat(client))
        await settled(lambda: engine.under_way == 1)
        client.app.drain()
        refused = await chat(client)
        ready = await client.get("/ready")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert (await client.get("/health")).status_code == 200
        assert (await under_way).json()["choices"][0]["message"]["content"] == "hello there"


async def test_health_is_red_while_the_engine_stands_still() -> None:
    engine = ScriptedEngine(stalled_for_s=299.0)
    async with client_of(engine) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        engine.stalled_for_s = 301.0
        for path in ("/health", "/ready"):
            health = await client.get(path)
            assert (health.status_code, health.json()) == (503, {"status": "stalled"})
        engine.stalled_for_s = 0.0
        assert (await client.get("/health")).status_code == 200
        engine.well = False
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503


async def test_health_stays_green_while_it_warms_up() -> None:
    async with client_of(ScriptedEngine(stalled_for_s=301.0)) as client:
        client.app.service.desk.warming_up = True
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).json() == {"status": "warming_up"}
        client.app.service.desk.warming_up = False
        assert (await client.get("/ready")).json() == {"status": "stalled"}
        assert (await client.get("/health")).status_code == 503


async def test_metrics() -> None:
    engine = ScriptedEngine(prompt=PromptOutput(3, "no_state", queue_s=0.0))
    async with client_of(engine) as client:
        await chat(client)
        await client.get("/nowhere/else")
        text = (await client.get("/metrics")).text
    for line in (
        'sevenfold_http_responses_total{route="/v1/chat/completions",status="200"} 1.0',
        'sevenfold_http_responses_total{route="other",status="404"} 1.0',
        'sevenfold_outputs_total{reason="stop"} 1.0',
        "sevenfold_generated_tokens_total 11.0",
        "sevenfold_cached_tokens_total 3.0",
        'sevenfold_cache_misses_total{reason="no_state"} 1.0',
        "sevenfold_time_to_first_token_seconds_count 1.0",
        "sevenfold_inter_token_seconds_count 10.0",
        "sevenfold_decode_seconds_count 1.0",
        "sevenfold_nonfinite_outputs_total 4.0",
        'sevenfold_requests_waiting{reason="memory"} 2.0',
        'sevenfold_memory_bytes{tenant="kv"} 7.0',
        "sevenfold_effective_concurrency 1.0",
        "sevenfold_queue_seconds_count 1.0",
        "sevenfold_prefill_seconds_count 1.0",
        "sevenfold_outputs_under_way 0.0",
        "sevenfold_outputs_limit 256.0",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"host": "0.0.0.0"}, "api_keys must be given to listen beyond this machine"),
        ({"api_keys": ["short"]}, "at least 16 characters"),
        ({"port": 70_000}, "port must be valid"),
        ({"admin_keys": [KEY]}, "admin_keys must be left out without api_keys"),
        ({"api_keys": [KEY], "admin_keys": [KEY]}, "admin_keys must be other keys than api_keys"),
        ({"max_requests": 2}, "max_choices must be at most max_requests = 2, got 128"),
    ],
)
def test_settings_that_break_a_rule(values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(ServerSettings, values, "serve")


async def test_the_document_has_the_errors_and_the_key_that_there_are() -> None:
    async with client_of(ScriptedEngine()) as client:
        document, again = [(await client.get("/openapi.json")).json() for _ in "ab"]
    assert document == again
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert [one for one in operations if "422" in one["responses"]] == []
    assert "ValidationError" not in document["components"]["schemas"]
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []


async def test_pages_bring_everything_themselves() -> None:
    async with client_of(ScriptedEngine()) as client:
        for path in ("/", "/docs"):
            response = await client.get(path)
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http://" not in response.text
            assert "https://" not in response.text
            assert " style=" not in response.text
            assert "onclick" not in response.text
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["scripted"]
        assert (await client.get("/v1/models/scripted")).json() == models[0]
        assert (await client.get("/v1/models/other")).status_code == 404
        told = (await client.get("/tokenizer_info")).json()
        assert (told["eos_token"], told["vocab_size"]) == ("<|end|>", VOCAB_SIZE)
        assert told["chat_template"].endswith("Assistant:{% endif %}\n")
        assert (await client.get("/version")).json() == {"version": version("sevenfold")}
        document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/health"}


async def test_a_long_chat_of_many_messages_is_rendered() -> None:
    engine = ScriptedEngine(max_context_tokens=1 << 24)
    turn = {"content": "x y " * 75, "cache_control": {"type": "ephemeral"}}
    messages = [{"role": role, **turn} for role in ("user", "assistant") * 2000]
    for one in messages[4:]:
        del one["cache_control"]
    settings = ServerSettings(template_timeout_s=20.0)
    async with client_of(engine, settings=settings) as client:
        response = await chat(client, messages=messages)
    assert response.status_code == 200, response.text
    [asked] = engine.asked
    assert len(asked.marks) == 6  # after all, after all but one, and where the caller says
