"""/v1/chat/completions: a conversation in, an answer out, whole or as it comes."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sevenfold.server.answers import AnswerBuilder, token_logprobs
from sevenfold.server.api_chat import (
    AllowedToolChoice,
    ChatCompletion,
    ChatRequest,
    NamedTool,
    ToolFunction,
)
from sevenfold.server.constraints import AskedGrammar, call_grammar, format_grammar
from sevenfold.server.disconnects import EventStream, unless_gone
from sevenfold.server.engine_protocol import GenerationRequest
from sevenfold.server.errors import bad_request
from sevenfold.server.output_parser import OutputParser, Part
from sevenfold.server.prompts import Prompt, check_length
from sevenfold.server.routing import StrictRoute, errors
from sevenfold.server.runs import Run, StreamUsage
from sevenfold.server.sampling import sampling_params, seeded
from sevenfold.server.service import Service
from sevenfold.server.strict_tools import strict_grammar


def chat_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(route_class=StrictRoute, tags=["generate"])

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        with service.desk.preparing():
            salt = service.salt(request, body)
            chat = await unless_gone(request, _prepared(service, body, salt))
        run = service.desk.open(chat.requests)
        if body.stream:
            return EventStream(chat.events(run), run.close, run.limit_s)
        try:
            answer = await unless_gone(request, chat.whole(run))
        finally:
            await run.close()
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


async def _prepared(service: Service, body: ChatRequest, salt: bytes) -> "_Chat":
    service.check_common(body)
    tools, forced = _callable(body)
    grammar = _grammar(service, body, tools if forced else None)
    shown = None if body.tool_choice == "none" else body.tools
    prompt = await service.prompts.chat(body.messages, shown)
    thinking = prompt.thinking and grammar is None
    if grammar is None:
        grammar = strict_grammar(tools, service.settings, thinking=thinking)
    elif not forced and any(tool.strict for tool in tools):
        raise bad_request(
            "strict must be left out, or false, beside a response_format for the whole answer",
            "tools",
        )
    if grammar is not None:
        service.need("constraint", grammar.param)
    requests = await _requests(service, body, prompt, salt, grammar)
    names = frozenset(tool.name for tool in tools)
    return _Chat(service, body, requests, names, forced, thinking)


def _callable(body: ChatRequest) -> tuple[list[ToolFunction], bool]:
    """Return the tools that may be called, and whether one must be."""
    functions, choice = [tool.function for tool in body.tools or []], body.tool_choice
    if choice in ("auto", "required") and not functions:
        raise bad_request(f"tools must be given for tool_choice {choice}", "tools")
    match choice:
        case NamedTool():
            return _named([choice], functions), True
        case AllowedToolChoice(allowed_tools=allowed):
            return _named(allowed.tools, functions), allowed.mode == "required"
        case "none":
            return [], False
    return functions, choice == "required"


def _named(wanted: Sequence[NamedTool], functions: Sequence[ToolFunction]) -> list[ToolFunction]:
    names = {one.function.name for one in wanted}
    beyond = sorted(names - {function.name for function in functions})
    if beyond:
        raise bad_request(f"tool_choice must name one of tools, got {beyond[0]!r}", "tool_choice")
    return [function for function in functions if function.name in names]


def _grammar(
    service: Service, body: ChatRequest, forced: Sequence[ToolFunction] | None
) -> AskedGrammar | None:
    """Return what the whole answer must follow; None if it is free."""
    grammar = format_grammar(body.response_format, service.settings)
    if forced is None:
        return grammar
    if grammar is not None:
        raise bad_request(
            "response_format must be left out when tool_choice makes the answer a call",
            "response_format",
        )
    return call_grammar(forced, service.settings)


async def _requests(
    service: Service, body: ChatRequest, prompt: Prompt, salt: bytes, grammar: AskedGrammar | None
) -> list[GenerationRequest]:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs must be left out without logprobs", "top_logprobs")
    asked = body.max_completion_tokens or body.max_tokens
    default = service.settings.max_default_tokens
    params = sampling_params(
        body,
        max_tokens=check_length(prompt, asked, default, service.codec, "messages"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
        stop=service.template.stop,
        codec=service.codec,
    )
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return [
        GenerationRequest(
            id=f"{name}-{n}",
            prompt=prompt.ids,
            sampling=seeded(params, n),
            constraint=None if grammar is None else await service.compiler.compile(grammar),
            priority=body.priority,
            deadline_s=service.deadline_s(body),
            salt=salt,
            marks=prompt.marks,
            session=body.session,
        )
        for n in range(body.n or 1)
    ]


@dataclass(frozen=True)
class _Chat:
    """One request for answers, ready to run."""

    service: Service
    body: ChatRequest
    requests: list[GenerationRequest]
    tools: frozenset[str]
    forced: bool
    thinking: bool

    def _parser(self) -> OutputParser:
        return OutputParser(thinking=self.thinking, tools=self.tools, forced=self.forced)

    async def whole(self, run: Run) -> ChatCompletion:
        """Return all answers at once."""
        answers = [AnswerBuilder(n) for n in range(len(self.requests))]
        async for index, parts, logprobs, reason in self._parts(run):
            answers[index].add(parts, logprobs, reason)
        return ChatCompletion(
            id=self._id,
            created=int(time.time()),
            model=self.service.engine.model_name,
            choices=[answer.choice(bool(self.body.logprobs)) for answer in answers],
            usage=run.usage(1),
        )

    async def events(self, run: Run) -> AsyncIterator[dict[str, Any]]:
        """Give the answers' chunks as they come."""
        created, usage = int(time.time()), StreamUsage(self.body.stream_options, run, 1)

        def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
            return {
                "id": self._id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": self.service.engine.model_name,
                "choices": choices,
            } | usage.so_far()

        calls = [0] * len(self.requests)
        for n in range(len(self.requests)):
            yield chunk([_choice(n, {"role": "assistant", "content": ""})])
        async for index, parts, logprobs, reason in self._parts(run):
            for part in parts:
                yield chunk([_choice(index, _delta(part, calls, index))])
            if logprobs is not None or reason is not None:
                yield chunk([_choice(index, {}, logprobs, reason)])
        if usage.at_end:
            yield chunk([]) | usage.whole()

    async def _parts(
        self, run: Run
    ) -> AsyncIterator[tuple[int, list[Part], list[dict[str, Any]] | None, str | None]]:
        """Give for each token: output, parts of its text, log probabilities, why it ended."""
        parsers = [self._parser() for _ in self.requests]
        called = [False] * len(self.requests)
        async for index, output in run.outputs():
            parts = parsers[index].push(output.text)
            if output.finish_reason is not None:
                parts += parsers[index].finish()
            reason: str | None = output.finish_reason
            called[index] |= any(part.kind == "tool_call" for part in parts)
            if called[index] and self.body.parallel_tool_calls is False:
                parts, reason = _one_call(parts), "tool_calls"
                if output.finish_reason is None:
                    await run.stop(index, "tool_calls")
            elif called[index] and reason == "stop":
                reason = "tool_calls"
            logprobs = (
                None
                if output.logprobs is None
                else [token_logprobs(output.token_id, output.logprobs, self.service.codec)]
            )
            yield index, parts, logprobs, reason

    @property
    def _id(self) -> str:
        return self.requests[0].id.removesuffix("-0")


def _one_call(parts: list[Part]) -> list[Part]:
    """Parts up to the first tool call."""
    for place, part in enumerate(parts):
        if part.kind == "tool_call":
            return parts[: place + 1]
    return parts


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: list[dict[str, Any]] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    content = None if logprobs is None else {"content": logprobs}
    return {"index": index, "delta": delta, "logprobs": content, "finish_reason": reason}


def _delta(part: Part, calls: list[int], index: int) -> dict[str, Any]:
    if part.call is None:
        name = "reasoning_content" if part.kind == "reasoning" else "content"
        return {name: part.text}
    place = calls[index]
    calls[index] += 1
    function = {"name": part.call.name, "arguments": part.call.arguments}
    call = {"index": place, "id": part.call.id, "type": "function", "function": function}
    return {"tool_calls": [call]}
