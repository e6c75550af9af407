"""/v1/completions: prompts in, what follows them out, whole or as it comes."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sevenfold.engine.sampling import Logprobs
from sevenfold.engine.token_ids import TokenIds
from sevenfold.server.answers import LEAST_LOGPROB
from sevenfold.server.api_completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from sevenfold.server.codec import Codec
from sevenfold.server.constraints import format_grammar
from sevenfold.server.disconnects import EventStream, unless_gone
from sevenfold.server.engine_protocol import GenerationRequest, TokenOutput
from sevenfold.server.errors import bad_request
from sevenfold.server.prompts import Prompt, check_length
from sevenfold.server.routing import StrictRoute, errors
from sevenfold.server.runs import Run, StreamUsage
from sevenfold.server.sampling import sampling_params, seeded
from sevenfold.server.service import Service

DEFAULT_TOKENS = 16  # as in OpenAI's interface


def completions_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(route_class=StrictRoute, tags=["generate"])

    @router.post(
        "/v1/completions",
        response_model=Completion,
        responses=errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from prompts; with `stream` as server-sent events."""
        with service.desk.preparing():
            salt = service.salt(request, body)
            job = await unless_gone(request, _prepared(service, body, salt))
        run = service.desk.open(job.requests)
        if body.stream:
            return EventStream(job.events(run), run.close, run.limit_s)
        try:
            answer = await unless_gone(request, job.whole(run))
        finally:
            await run.close()
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


async def _prepared(service: Service, body: CompletionRequest, salt: bytes) -> "_Job":
    service.check_common(body)
    if body.echo and body.logprobs is not None:
        service.need("prompt_logprobs", "echo with logprobs")
    prompts = await _prompts(service, body)
    num_choices = len(prompts) * (body.n or 1)
    most = service.settings.max_choices
    if num_choices > most:
        raise bad_request(f"prompts times n must be at most {most}, got {num_choices}", "prompt")
    requests = await _requests(service, body, prompts, salt)
    return _Job(service, body, requests, len(prompts))


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    prompt = body.prompt
    most = service.settings.max_choices
    if isinstance(prompt, str):
        return [await service.prompts.text(prompt, "prompt")]
    several: list[Any] = [prompt] if isinstance(prompt[0], int) else list(prompt)
    if len(several) > most:
        raise bad_request(f"prompts must be at most {most}, got {len(several)}", "prompt")
    return [
        await service.prompts.text(one, "prompt") if isinstance(one, str) else Prompt(TokenIds(one))
        for one in several
    ]


async def _requests(
    service: Service, body: CompletionRequest, prompts: Sequence[Prompt], salt: bytes
) -> list[GenerationRequest]:
    grammar = format_grammar(body.response_format, service.settings)
    if grammar is not None:
        service.need("constraint", grammar.param)
    name = f"cmpl-{secrets.token_hex(12)}"
    asked = body.max_tokens or DEFAULT_TOKENS
    made = []
    for prompt in prompts:
        params = sampling_params(
            body,
            max_tokens=check_length(prompt, asked, asked, service.codec, "prompt"),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            stop=(),
            codec=service.codec,
        )
        for n in range(body.n or 1):
            constraint = None if grammar is None else await service.compiler.compile(grammar)
            request = GenerationRequest(
                id=f"{name}-{len(made)}",
                prompt=prompt.ids,
                sampling=seeded(params, n),
                constraint=constraint,
                priority=body.priority,
                deadline_s=service.deadline_s(body),
                salt=salt,
                marks=_marks(body.cache_marks or [], prompt),
                session=body.session,
            )
            made.append(request)
    return made


def _marks(marks: Sequence[int], prompt: Prompt) -> tuple[int, ...]:
    most = len(prompt.ids)
    rising = all(a < b for a, b in pairwise(marks))
    if not rising or (marks and marks[-1] > most):
        raise bad_request(
            f"cache_marks must rise and be at most the prompt's {most} tokens, got {list(marks)}",
            "cache_marks",
        )
    return tuple(marks)


@dataclass(frozen=True)
class _Job:
    """One request for completions, ready to run."""

    service: Service
    body: CompletionRequest
    requests: list[GenerationRequest]
    num_prompts: int

    async def whole(self, run: Run) -> Completion:
        """Return all outputs at once."""
        outputs = [_Output(request, self.body, self.service.codec) for request in self.requests]
        async for index, output in run.outputs():
            outputs[index].take(output)
        choices = [output.choice(n) for n, output in enumerate(outputs)]
        return Completion(**self._head(), choices=choices, usage=run.usage(self.num_prompts))

    async def events(self, run: Run) -> AsyncIterator[dict[str, Any]]:
        """Give the outputs' chunks as they come; each is a choice of what one token brought."""
        outputs = [_Output(request, self.body, self.service.codec) for request in self.requests]
        head = self._head() | {"object": "text_completion"}
        usage = StreamUsage(self.body.stream_options, run, self.num_prompts)
        async for index, output in run.outputs():
            outputs[index].take(output)
            choice = outputs[index].taken(index)
            if choice is not None:
                yield head | {"choices": [choice]} | usage.so_far()
        if usage.at_end:
            yield head | {"choices": []} | usage.whole()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.requests[0].id.removesuffix("-0"),
            "created": int(time.time()),
            "model": self.service.engine.model_name,
        }


class _Output:
    """What one output has brought since it was last asked."""

    def __init__(self, request: GenerationRequest, body: CompletionRequest, codec: Codec) -> None:
        self._request, self._body, self._codec = request, body, codec
        self._texts: list[str] = []
        self._tokens: list[tuple[int, Logprobs | None]] = []
        self._reason: Literal["stop", "length"] | None = None
        self._offset = 0

    def take(self, output: TokenOutput) -> None:
        """Add a token."""
        if output.prompt is not None and self._body.echo:
            self._texts.append(self._codec.decode(self._request.prompt))
            known = output.prompt.logprobs or ()
            self._tokens += zip(self._request.prompt, (None, *known), strict=False)
        self._texts.append(output.text)
        self._tokens.append((output.token_id, output.logprobs))
        self._reason = output.finish_reason

    def choice(self, index: int) -> CompletionChoice:
        """Return the whole output, which has ended."""
        if self._reason is None:
            raise AssertionError("a run gives all tokens or raises")
        return CompletionChoice(
            index=index,
            text="".join(self._texts),
            logprobs=self._logprobs(),
            finish_reason=self._reason,
        )

    def taken(self, index: int) -> dict[str, Any] | None:
        """Return what is new as a chunk's choice; None if there is nothing to show."""
        text, logprobs = "".join(self._texts), self._logprobs()
        self._texts, self._tokens = [], []
        if not text and logprobs is None and self._reason is None:
            return None
        shown = None if logprobs is None else logprobs.model_dump()
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": self._reason}

    def _logprobs(self) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        texts = [self._text(token) for token, _ in self._tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        known = [logprobs for _, logprobs in self._tokens]
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[
                None if one is None else max(one.chosen, LEAST_LOGPROB) for one in known
            ],
            top_logprobs=[self._top(*pair) for pair in self._tokens],
            text_offset=offsets,
        )

    def _top(self, token: int, logprobs: Logprobs | None) -> dict[str, float] | None:
        if logprobs is None:
            return None
        # The chosen token is always among them, as in OpenAI's interface.
        values = {self._text(other): value for other, value in reversed(logprobs.top)}
        values[self._text(token)] = logprobs.chosen
        return {text: max(value, LEAST_LOGPROB) for text, value in values.items()}

    def _text(self, token: int) -> str:
        """A token's text; bytes that are no whole character as OpenAI's interface shows them."""
        content = self._codec.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
