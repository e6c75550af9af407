"""The socket's side: headers that do not arrive, a connection that goes on."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from server_helpers import KEY, ScriptedEngine, settled
from server_helpers import listening as serving

from sevenfold.server import ServerApp, ServerSettings, TemplateSource, bind, listening, make_server


def test_headers_that_do_not_arrive_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_HEADERS_S", 0.3)
    with serving(ScriptedEngine()) as url:
        port = int(url.rpartition(":")[2])
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
                slow.sendall(sent)
                assert slow.recv(1) == b""  # it was hung up on
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
            body = {"prompt": "a", "max_tokens": 3}
            for _ in range(2):
                assert client.post("/v1/completions", json=body).status_code == 200
                time.sleep(0.6)  # between requests, one connection may wait longer


class Start:
    """A server at its start: what warms it up, and its end."""

    def __init__(
        self, engine: ScriptedEngine, server: uvicorn.Server, client: httpx.AsyncClient
    ) -> None:
        self.engine, self.server, self.client = engine, server, client
        self.goes_on, self.error = asyncio.Event(), None
        self.whole: asyncio.Task | None = None

    async def warm_up(self) -> None:
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error

    async def statuses(self) -> tuple[int, int]:
        """Of /health and of /ready."""
        return tuple([(await self.client.get(path)).status_code for path in ("/health", "/ready")])


@asynccontextmanager
async def starting() -> AsyncIterator[Start]:
    settings = ServerSettings(port=0, drain_s=1.0)
    with bind(settings) as taken:
        engine = ScriptedEngine()
        app = ServerApp(engine, settings, TemplateSource())
        server = make_server(app, settings)
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url) as client:
            start = Start(engine, server, client)
            listen = listening._listen(app, server, taken, start.warm_up)
            start.whole = asyncio.create_task(listen)
            await settled(lambda: server.started)
            yield start
        server.should_exit = True
        await asyncio.wait((start.whole,))


@pytest.mark.anyio
async def test_it_is_healthy_at_once_and_ready_when_it_is_warm() -> None:
    async with starting() as start:
        assert await start.statuses() == (200, 503)
        assert (await start.client.get("/ready")).json() == {"status": "warming_up"}
        start.goes_on.set()
        for _ in range(3):
            await asyncio.sleep(0)
        assert await start.statuses() == (200, 200)
    assert start.whole.exception() is None


@pytest.mark.anyio
async def test_what_fails_while_it_warms_up_ends_it() -> None:
    async with starting() as start:
        start.error = RuntimeError("broken weights")
        start.goes_on.set()
        await asyncio.wait((start.whole,))
        with pytest.raises(RuntimeError, match="broken weights"):
            start.whole.result()


@pytest.mark.anyio
async def test_a_failed_start_is_neither_ready_nor_well() -> None:
    async with starting() as start:
        start.error, start.engine.well = RuntimeError("broken weights"), False
        start.goes_on.set()
        await settled(lambda: start.server.should_exit)
        # The socket closes meanwhile: the application is asked by itself.
        inside = httpx.ASGITransport(start.server.config.app)
        async with httpx.AsyncClient(transport=inside, base_url="http://127.0.0.1") as start.client:
            assert await start.statuses() == (503, 503)
            assert (await start.client.get("/ready")).json() == {"status": "draining"}


@pytest.mark.anyio
@pytest.mark.parametrize("is_warm", [False, True])
async def test_a_signal_stops_an_engine_that_is_not_warm(is_warm: bool) -> None:
    async with starting() as start:
        if is_warm:
            start.goes_on.set()
            for _ in range(3):
                await asyncio.sleep(0)
        start.server.handle_exit(signal.SIGTERM, None)
        assert start.engine.stopped == (0 if is_warm else 1)
        await asyncio.wait((start.whole,))
        assert start.whole.exception() is None


@pytest.mark.anyio
async def test_a_signal_while_it_warms_up_ends_it_well() -> None:
    async with starting() as start:
        start.server.should_exit = True
        await asyncio.wait((start.whole,))
        assert start.whole.exception() is None
