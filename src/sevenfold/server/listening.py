"""Listening: the port, the signals, the end."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sevenfold.server.app import ServerApp
from sevenfold.server.settings import ServerSettings

_KEEP_ALIVE_S = 75
_CONNECTIONS_A_REQUEST = 8
_MAX_HEADER_BYTES = 32 << 10
_HEADERS_S = 20.0


class _TimedProtocol(H11Protocol):
    """Hangs up on a connection whose request's headers do not arrive; uvicorn waits for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Between requests, when nothing has come, uvicorn's own limit holds.
        self._watch(self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(False)
        super().connection_lost(exc)

    def _watch(self, is_due: bool) -> None:
        if not is_due and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif is_due and self._timer is None:
            self._timer = self.loop.call_later(_HEADERS_S, self.transport.close)


class _Server(uvicorn.Server):
    """Drains on SIGTERM or SIGINT, and then ends as one that did its work."""

    def __init__(self, config: uvicorn.Config, app: ServerApp) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; a second signal ends those under way."""
        self._app.drain()
        self.force_exit = self.should_exit
        self.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """Take the port, before anything slow.

    Raises:
        OSError: it is in use, or the host has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"host must be an address of this machine, got {settings.host!r}") from error
    taken = socket.socket(family, kind, protocol)
    # A port whose last server has just ended can be taken again; one in use cannot.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen(0)
    except OSError as error:
        taken.close()
        raise OSError(_said(error, settings)) from error
    return taken


def _said(error: OSError, settings: ServerSettings) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port must be free, got {settings.port} on {settings.host}, which another program "
            "uses; choose one by --port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host must be an address of this machine, got {settings.host!r}"
    return f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}"


def make_server(app: ServerApp, settings: ServerSettings) -> uvicorn.Server:
    """Return a server that has not begun to listen."""
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s),
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        http=_TimedProtocol,
        ws="none",
        limit_concurrency=_CONNECTIONS_A_REQUEST * settings.max_requests,
        loop="asyncio",
        proxy_headers=False,
    )
    return _Server(config, app)


def listen(
    app: ServerApp,
    settings: ServerSettings,
    taken: socket.socket,
    warm_up: Callable[[], Awaitable[None]],
) -> None:
    """Serve until a signal comes and what is under way has ended.

    Args:
        app: what serves.
        settings: how.
        taken: the port.
        warm_up: runs meanwhile; the server is ready when it has ended. What it raises ends all.
    """
    asyncio.run(_listen(app, make_server(app, settings), taken, warm_up))


async def _listen(
    app: ServerApp,
    server: uvicorn.Server,
    taken: socket.socket,
    warm_up: Callable[[], Awaitable[None]],
) -> None:
    app.service.desk.warming_up = True
    serving = asyncio.create_task(server.serve([taken]))
    warming = asyncio.ensure_future(warm_up())
    await asyncio.wait((serving, warming), return_when=asyncio.FIRST_COMPLETED)
    was_stopped = server.should_exit
    if not was_stopped and warming.done() and warming.exception() is not None:
        app.drain()
        server.should_exit = True
    app.service.desk.warming_up = False
    await serving
    if was_stopped:
        # A signal came first: what warmed up has ended with the engine, or ends now.
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
    else:
        warming.result()
