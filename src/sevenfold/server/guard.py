"""What stands before every route: who may ask, from where, and how much at once."""

import asyncio
import ipaddress
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sevenfold.server.errors import ApiError, error_response
from sevenfold.server.keys import Caller, KeyRing
from sevenfold.server.metrics import Metrics
from sevenfold.server.settings import ServerSettings, is_loopback

CALLER = "sevenfold.caller"
PAGES = ("/", "/docs")  # a browser is asked for the key as a password
_OPEN_PATHS = ("/health",)
_ADMIN_PATHS = ("/metrics", "/reset_prefix_cache")


class Guard:
    """Refuses what no route should see.

    In this order: a Host that is not this machine (DNS rebinding), another site's Origin, no valid
    key, a body that is no JSON or too long.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, routes: Collection[str]
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = KeyRing(settings.api_keys, settings.admin_keys)
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no route speaks anything else
        send = self._counted(scope, send)
        headers = Headers(scope=scope)
        try:
            self._check_place(headers)
            scope[CALLER] = self._caller(scope, headers)
            receive = self._limited(scope, headers, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_place(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.on_loopback and not is_loopback(_without_port(host)):
            raise ApiError(403, "Host must name this machine, on which alone the server listens")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "Origin must be the server itself: other sites may not ask")

    def _caller(self, scope: Scope, headers: Headers) -> Caller | None:
        if scope["path"] in _OPEN_PATHS:
            return None
        caller = self._keys.caller(headers.get("authorization"))
        if caller is None:
            scheme = "Basic" if scope["path"] in PAGES else "Bearer"
            raise ApiError(
                401,
                "a valid API key must come with the request, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": f'{scheme} realm="sevenfold", charset="UTF-8"'},
            )
        if scope["path"] in _ADMIN_PATHS and not caller.is_admin:
            raise ApiError(403, "an admin key must come with this request", code="admin_only")
        return caller

    def _limited(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and scope["path"] in self._routes:
            raise ApiError(415, "Content-Type must be application/json")
        most = self._settings.max_body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise _too_large(most)
        return _counting(receive, most, self._settings.body_timeout_s)

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in self._routes else "other"
                self._metrics.responses.labels(route, str(message["status"])).inc()
            await send(message)

        return counted


def _counting(receive: Receive, most: int, timeout_s: float) -> Receive:
    taken, is_whole = 0, False
    end_s = time.monotonic() + timeout_s

    async def counting() -> Message:
        nonlocal taken, is_whole
        try:
            # What comes after the body is that the client has left, however late.
            async with asyncio.timeout(None if is_whole else end_s - time.monotonic()):
                message = await receive()
        except TimeoutError as error:
            raise ApiError(408, f"the body must arrive within {timeout_s:g} s") from error
        is_whole = not message.get("more_body", False)
        taken += len(message.get("body", b""))
        if taken > most:
            raise _too_large(most)
        return message

    return counting


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body must have at most {most} bytes", code="body_too_large")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host.partition(":")[0]
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()
