"""The server: OpenAI's interface over an engine. Needs the extra `serve`."""

from sevenfold.engine import RequestFailedError
from sevenfold.server.app import ServerApp
from sevenfold.server.batching_engine import BatchingEngine
from sevenfold.server.chat_template import TemplateSource, read_template
from sevenfold.server.engine_protocol import (
    EngineFullError,
    EngineStats,
    EngineStoppedError,
    GenerationRequest,
    PromptOutput,
    ServingEngine,
    TokenConstraint,
    TokenOutput,
)
from sevenfold.server.listening import bind, listen, make_server
from sevenfold.server.settings import ServerSettings

__all__ = [
    "BatchingEngine",
    "EngineFullError",
    "EngineStats",
    "EngineStoppedError",
    "GenerationRequest",
    "PromptOutput",
    "RequestFailedError",
    "ServerApp",
    "ServerSettings",
    "ServingEngine",
    "TemplateSource",
    "TokenConstraint",
    "TokenOutput",
    "bind",
    "listen",
    "make_server",
    "read_template",
]
