"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from sevenfold.engine import RequestFailedError
from sevenfold.server.engine_protocol import (
    EngineFullError,
    EngineStoppedError,
)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_SHOWN_FAULTS = 3
_SHOWN_CHARS = 200
_log = logging.getLogger("sevenfold.server")


class ApiError(HTTPException):
    """A request that is refused or fails, with what the caller is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        error = {
            "message": self.detail,
            "type": _TYPES.get(self.status_code, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that breaks a rule."""
    return ApiError(400, message, param=param, code=code)


def from_engine(error: Exception) -> ApiError:
    """What a caller is told of an engine's error."""
    if isinstance(error, EngineFullError):
        return too_many(1)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), code="stopped", headers={"Retry-After": "5"})
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error), code="request_failed", headers=NO_RETRY)
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says more", headers=NO_RETRY)


def too_many(retry_after_s: int) -> ApiError:
    """The queue is full."""
    message = f"too many requests are waiting; try again in {retry_after_s} s"
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, code="queue_full", headers=headers)


# The same request would fail again, so OpenAI's client shall not repeat it by itself.
NO_RETRY = {"x-should-retry": "false"}


def error_response(error: ApiError) -> Response:
    """The response that carries an error; ASCII, whatever a caller's text holds."""
    content = json.dumps(error.body).encode()
    return Response(content, error.status_code, error.headers, "application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of an app take OpenAI's shape."""

    async def refused(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return error_response(from_engine(error))
        if not isinstance(error, ApiError):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return error_response(error)

    async def invalid(_: Request, error: Exception) -> Response:
        faults = error.errors() if isinstance(error, RequestValidationError) else []
        return error_response(_from_faults(faults))

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, refused)


def _from_faults(faults: Sequence[Any]) -> ApiError:
    said = list(dict.fromkeys(_fault(fault) for fault in faults))
    more = f" (and {len(said) - _SHOWN_FAULTS} more)" if len(said) > _SHOWN_FAULTS else ""
    param = _place(faults[0]) if faults else None
    return bad_request("; ".join(said[:_SHOWN_FAULTS]) + more, param or None)


def _fault(fault: Any) -> str:
    where = _place(fault) or "body"
    if fault["type"] == "extra_forbidden":
        return f"{where} is not a parameter that this server knows; leave it out"
    if fault["type"] == "missing":
        return f"{where} must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    got = repr(fault["input"])
    got = got if len(got) <= _SHOWN_CHARS else got[:_SHOWN_CHARS] + "..."
    return f"{where} must be valid: {message}, got {got}"


def _place(fault: Any) -> str:
    return ".".join(str(part) for part in fault["loc"] if part != "body")
