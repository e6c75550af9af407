"""The application: routes behind the guard, errors in one shape, a page for people."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp

from sevenfold.server.chat import chat_router
from sevenfold.server.chat_template import ChatTemplate, TemplateSource
from sevenfold.server.completions import completions_router
from sevenfold.server.engine_protocol import ServingEngine
from sevenfold.server.errors import install_error_handlers
from sevenfold.server.guard import Guard
from sevenfold.server.pages import pages_router
from sevenfold.server.service import Service
from sevenfold.server.settings import ServerSettings
from sevenfold.server.status import health_router, models_router, tokens_router


class ServerApp:
    """An ASGI application over one engine."""

    def __init__(
        self, engine: ServingEngine, settings: ServerSettings, template: TemplateSource
    ) -> None:
        """Put the application together.

        Args:
            engine: what generates; closed when the application ends.
            settings: limits and keys.
            template: how conversations become prompts.

        Raises:
            CheckpointError: the template cannot be compiled.
        """
        self._template = ChatTemplate(template, settings.template_timeout_s)
        self.service = Service.build(engine, settings, self._template)
        self.api, paths = _api(self.service, self.close)
        self._guarded: ASGIApp = Guard(self.api, settings, self.service.metrics, paths)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Speak ASGI."""
        await self._guarded(scope, receive, send)

    def drain(self) -> None:
        """Take no new requests; those under way go on, unless all wait for the server's start."""
        desk = self.service.desk
        desk.draining = True
        if desk.warming_up:
            self.service.engine.stop()

    def close(self) -> None:
        """End the engine and the template's process."""
        self.service.engine.close()
        self._template.close()


class _Api(FastAPI):
    """FastAPI, whose document is written when it is first asked for: it takes 0.1 s."""

    def openapi(self) -> dict[str, Any]:
        is_new = self.openapi_schema is None
        schema = super().openapi()
        if is_new:
            _correct(schema)
        return schema


def _api(service: Service, close: Callable[[], None]) -> tuple[FastAPI, list[str]]:
    """The application, and the paths of its routes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        close()

    # FastAPI's own documentation pages load scripts from elsewhere.
    api = _Api(
        title="Sevenfold", docs_url=None, redoc_url=None, lifespan=lifespan, description=_ABOUT
    )
    routers = (
        chat_router(service),
        completions_router(service),
        models_router(service),
        tokens_router(service),
        health_router(service),
        pages_router(service, api),
    )
    for router in routers:
        api.include_router(router)
    install_error_handlers(api)
    routes = [route for router in routers for route in router.routes]
    paths = [route.path for route in routes if isinstance(route, APIRoute)]
    return api, [*paths, "/openapi.json"]


_ABOUT = "An OpenAI-compatible server of hybrid linear-attention language models."


def _correct(schema: dict[str, Any]) -> None:
    """Leave the 422 out of the OpenAPI that FastAPI writes: what breaks a rule gets 400."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}]
    schema["paths"]["/health"]["get"]["security"] = []
