"""What every route needs, put together once."""

import time
from dataclasses import dataclass

from starlette.requests import Request

from sevenfold.server.api_common import SamplingFields
from sevenfold.server.chat_template import ChatTemplate
from sevenfold.server.codec import Codec
from sevenfold.server.constraints import Compiler
from sevenfold.server.engine_protocol import Feature, ServingEngine
from sevenfold.server.errors import ApiError, bad_request
from sevenfold.server.guard import CALLER
from sevenfold.server.keys import ANYONE, Caller
from sevenfold.server.metrics import Metrics
from sevenfold.server.prompts import Prompts
from sevenfold.server.runs import Desk
from sevenfold.server.settings import ServerSettings


@dataclass(frozen=True)
class Service:
    """The parts that routes share."""

    engine: ServingEngine
    settings: ServerSettings
    template: ChatTemplate
    codec: Codec
    prompts: Prompts
    compiler: Compiler
    metrics: Metrics
    desk: Desk
    started_s: int

    @classmethod
    def build(
        cls, engine: ServingEngine, settings: ServerSettings, template: ChatTemplate
    ) -> "Service":
        """Put the parts together."""
        codec = Codec(engine.tokenizer, engine.vocab_size, engine.max_context_tokens)
        # Without admin keys every caller reads the metrics, and not every one is alone.
        exact_misses = bool(settings.admin_keys) or not settings.api_keys
        metrics = Metrics(engine, exact_misses=exact_misses)
        return cls(
            engine=engine,
            settings=settings,
            template=template,
            codec=codec,
            prompts=Prompts(codec, template, settings),
            compiler=Compiler(engine.tokenizer, engine.vocab_size, engine.eos_token_id, settings),
            metrics=metrics,
            desk=Desk(engine, settings, metrics),
            started_s=int(time.time()),
        )

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model."""
        if name not in (None, self.engine.model_name):
            raise ApiError(
                404,
                f"model must be {self.engine.model_name!r}, which alone is served, got {name!r}",
                param="model",
                code="model_not_found",
            )

    def need(self, feature: Feature, param: str) -> None:
        """Refuse a parameter that the engine cannot honour."""
        if feature not in self.engine.features:
            raise bad_request(
                f"{param} must be left out: the engine that serves this model does not support it",
                param,
                "unsupported_parameter",
            )

    def check_common(self, body: SamplingFields) -> None:
        """Check what every generating endpoint takes."""
        self.check_model(body.model)
        if body.priority:
            self.need("priority", "priority")
        if body.session is not None:
            self.need("session", "session")
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options must be left out without stream", "stream_options")

    def deadline_s(self, body: SamplingFields) -> float:
        """Seconds that a request has."""
        most = self.settings.max_deadline_s
        if body.deadline_s is not None and body.deadline_s > most:
            raise bad_request(
                f"deadline_s must be at most {most:g}, got {body.deadline_s:g}", "deadline_s"
            )
        return body.deadline_s or most

    def salt(self, request: Request, body: SamplingFields) -> bytes:
        """Return the cache's salt of a request."""
        caller = request.scope.get(CALLER)
        return (caller if isinstance(caller, Caller) else ANYONE).salt(body.cache_salt)
