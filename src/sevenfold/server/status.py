"""Routes that compute nothing: models, tokens, health, metrics."""

import asyncio
from importlib.metadata import version as sevenfold_version

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sevenfold.server.api_tokens import (
    DetokenizeRequest,
    Model,
    Models,
    Status,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    Version,
)
from sevenfold.server.disconnects import unless_gone
from sevenfold.server.errors import bad_request
from sevenfold.server.prompts import Prompt
from sevenfold.server.routing import StrictRoute, errors
from sevenfold.server.service import Service

_REFUSALS = (400, 401, 403, 404, 408, 413, 415)


def models_router(service: Service) -> APIRouter:
    """Return /v1/models."""
    router = APIRouter(tags=["models"])
    model = Model(
        id=service.engine.model_name,
        created=service.started_s,
        max_model_len=service.engine.max_context_tokens,
    )

    @router.get("/v1/models", responses=errors(401, 403))
    async def models() -> Models:
        """List the one model that is served."""
        return Models(data=[model])

    @router.get("/v1/models/{name:path}", responses=errors(401, 403, 404))
    async def one_model(name: str) -> Model:
        """Describe a model."""
        service.check_model(name)
        return model

    return router


def tokens_router(service: Service) -> APIRouter:
    """Return /tokenize, /detokenize and /tokenizer_info."""
    router = APIRouter(route_class=StrictRoute, tags=["tokens"])
    info = _tokenizer_info(service)

    @router.post("/tokenize", responses=errors(*_REFUSALS, 429, 503))
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
        """Return the tokens of a text or a conversation."""
        service.check_model(body.model)
        with service.desk.preparing():
            prompt = await unless_gone(request, _prompt(service, body))
        return Tokens(
            tokens=list(prompt.ids),
            count=len(prompt.ids),
            marks=list(prompt.marks),
            max_model_len=service.engine.max_context_tokens,
        )

    @router.post("/detokenize", responses=errors(*_REFUSALS))
    async def detokenize(body: DetokenizeRequest) -> Text:
        """Return the text of tokens, special ones included."""
        service.check_model(body.model)
        beyond = [token for token in body.tokens if token >= service.codec.vocab_size]
        if beyond:
            raise bad_request(
                f"tokens must be below {service.codec.vocab_size}, got {beyond[0]}", "tokens"
            )
        return Text(prompt=await asyncio.to_thread(service.codec.decode, body.tokens))

    @router.get("/tokenizer_info", responses=errors(401, 403))
    async def tokenizer_info() -> TokenizerInfo:
        """Describe the tokenizer, as clients that count tokens ask for it."""
        return info

    return router


def health_router(service: Service) -> APIRouter:
    """Return /health, /ready, /metrics, /version and /reset_prefix_cache."""
    router = APIRouter(tags=["operation"])
    unwell = {503: {"model": Status, "description": "It is not."}}

    @router.get("/health", response_model=Status, responses=unwell | errors(403))
    async def health() -> Response:
        """Say whether the engine makes progress; the only route that needs no key."""
        return _status("ok" if service.desk.healthy() else "stalled")

    @router.get("/ready", response_model=Status, responses=unwell | errors(401, 403))
    async def ready() -> Response:
        """Say whether new requests are taken, and need not wait for the server's start."""
        if service.desk.draining:
            return _status("draining")
        if service.desk.warming_up:
            return _status("warming_up")
        return _status("ok" if service.desk.healthy() else "stalled")

    @router.get(
        "/metrics",
        responses=errors(401, 403) | {200: {"content": {"text/plain": {}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        """Give counts and gauges in Prometheus' text form."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.post("/reset_prefix_cache", response_model=Status, responses=errors(401, 403, 415))
    async def reset_prefix_cache() -> Response:
        """Drop what is cached and in nobody's use, sessions too."""
        service.engine.forget()
        return _status("ok")

    @router.get("/version", responses=errors(401, 403))
    async def version() -> Version:
        """Name the version of the server."""
        return Version(version=sevenfold_version("sevenfold"))

    return router


def _status(status: str) -> Response:
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _tokenizer_info(service: Service) -> TokenizerInfo:
    engine, source = service.engine, service.template.source
    named = {name: source.variables.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    if engine.eos_token_id is not None:
        named["eos"] = engine.tokenizer.id_to_token(engine.eos_token_id)
    return TokenizerInfo(
        bos_token=named["bos"],
        eos_token=named["eos"],
        pad_token=named["pad"],
        chat_template=source.text,
        model_max_length=engine.max_context_tokens,
        vocab_size=engine.vocab_size,
    )


async def _prompt(service: Service, body: TokenizeRequest) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("one of prompt and messages must be given, and only one")
    if body.messages is not None:
        return await service.prompts.chat(body.messages, body.tools)
    if body.tools is not None:
        raise bad_request("tools must be left out without messages", "tools")
    return await service.prompts.text(body.prompt or "", "prompt")
