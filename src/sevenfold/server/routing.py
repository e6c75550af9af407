"""Routes whose bodies are parsed strictly, and the responses that all of them may give."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from sevenfold.server.api_common import ErrorBody
from sevenfold.server.errors import bad_request

_MEANING = {
    400: "The request breaks a rule.",
    401: "No valid API key.",
    403: "Host or Origin is another's.",
    404: "No such model.",
    408: "The body has not arrived in time.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    429: "Too many requests are waiting.",
    500: "The request failed.",
    503: "The server is stopping or not well.",
    504: "The deadline has passed.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document the error responses of a route."""
    return {status: {"model": ErrorBody, "description": _MEANING[status]} for status in statuses}


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Parse the body; NaN, infinities, broken Unicode and deep nesting are refused."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise bad_request(f"the body must be JSON: {error}") from error


class StrictRoute(APIRoute):
    """A route that parses JSON as its standard says."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Hand FastAPI a request that parses strictly."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handler
