"""Work for a client that may leave: when it does, the work ends."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sevenfold.server.errors import ApiError, from_engine

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work, and cancel it if the client disconnects first.

    Raises:
        ApiError: 499; nobody reads it.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Server-sent events, one JSON each and `[DONE]` at the end; an error is an event too."""

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        close: Callable[[], Awaitable[None]],
        limit_s: float,
    ) -> None:
        """Take what to send.

        Args:
            events: what to send.
            close: called at the end, whatever the end is.
            limit_s: seconds after which a client that does not read what is sent is hung up on.
        """
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        # A stream has no length, which Response sets.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._events, self._close, self._limit_s = events, close, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        task = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait(
                (task, gone), timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                task.result()
        finally:
            await _end(task, gone)
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with contextlib.suppress(OSError):  # the client has left between two events
            try:
                async for event in self._events:
                    await _send_event(send, json.dumps(event))
                await _send_event(send, "[DONE]")
            except OSError:
                raise
            except Exception as error:
                told = error if isinstance(error, ApiError) else from_engine(error)
                await _send_event(send, json.dumps(told.body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
