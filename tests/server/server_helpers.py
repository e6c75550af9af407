"""A tiny model, a scripted engine, and clients of an application that runs in this process."""

import asyncio
import atexit
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sevenfold.engine import LLM, TextModel
from sevenfold.engine.sizing import size_engine
from sevenfold.models import HybridModel, ModelConfig, MoEConfig, init_weights
from sevenfold.server import (
    BatchingEngine,
    EngineStats,
    GenerationRequest,
    PromptOutput,
    ServerApp,
    ServerSettings,
    ServingEngine,
    TemplateSource,
    TokenOutput,
    bind,
    make_server,
)
from sevenfold.server import app as server_app
from sevenfold.server.chat_template import ChatTemplate

EOS = 256
VOCAB_SIZE = 257
CONTEXT = 512
BASE_URL = "http://127.0.0.1:8000"
KEY = "a key of some length"
HELLO = [{"role": "user", "content": "hello"}]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and one that ends an output."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def make_llm() -> LLM:
    """Two layers of random weights, large enough for outputs to differ."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        layer_types=("linear_attention", "full_attention"),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=12,
        rotary_dim=4,
        max_position_embeddings=CONTEXT,
        eos_token_id=EOS,
        moe=MoEConfig(num_local_experts=2, num_experts_per_tok=1),
    )
    model = init_weights(HybridModel(config), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
    return LLM(TextModel(model.requires_grad_(False), byte_tokenizer()), memory_bytes=1 << 20)


def make_engine(llm: LLM) -> BatchingEngine:
    """A megabyte for states, keys and cached prefixes."""
    plan, limits = size_engine(llm.model, budget_bytes=1 << 20)
    return BatchingEngine(TextModel(llm.model, llm.tokenizer), "tiny", plan, limits)


@dataclass
class ScriptedEngine:
    """Says the same text to everyone, a token a character; notes what it was asked."""

    text: str = "hello there"
    model_name: str = "scripted"
    max_context_tokens: int = CONTEXT
    vocab_size: int = VOCAB_SIZE
    eos_token_id: int | None = EOS
    features: frozenset = frozenset()
    wait_s: float = 0.0
    stall_after: int | None = None
    prompt: PromptOutput = field(default_factory=lambda: PromptOutput(3, "no_state"))
    error: Exception | None = None
    well: bool = True
    stalled_for_s: float = 0.0
    asked: list[GenerationRequest] = field(default_factory=list)
    under_way: int = 0
    cancelled: int = 0
    forgotten: int = 0
    stopped: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = byte_tokenizer()

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        self.asked.append(request)
        self.under_way += 1
        ended = False
        try:
            ids = self.tokenizer.encode(self.text, add_special_tokens=False).ids
            ids = ids[: request.sampling.max_tokens]
            for n, token in enumerate(ids):
                if n == self.stall_after:
                    if self.error is not None:
                        raise self.error
                    await asyncio.Event().wait()
                await asyncio.sleep(self.wait_s)
                last = n == len(ids) - 1
                output = TokenOutput(token, self.text[n], "stop" if last else None)
                ended = last
                yield output if n else replace(output, prompt=self.prompt)
        finally:
            self.under_way -= 1
            self.cancelled += not ended

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.under_way,
            waiting={"memory": 2},
            memory_bytes={"kv": 7},
            nonfinite_outputs=4,
            misses={"other_salt": 2, "no_kv": 3},
        )

    def healthy(self) -> bool:
        return self.well

    def stalled_s(self) -> float:
        return self.stalled_for_s

    def forget(self) -> None:
        self.forgotten += 1

    def stop(self) -> None:
        self.stopped += 1

    def close(self) -> None:
        return


class KeptTemplate(ChatTemplate):
    """The default template, whose process stays for the next application: it takes 0.1 s."""

    def close(self) -> None:
        return


@cache
def kept_template() -> KeptTemplate:
    kept = KeptTemplate(TemplateSource(), ServerSettings().template_timeout_s)
    atexit.register(ChatTemplate.close, kept)
    return kept


def new_app(engine: Any, settings: ServerSettings, template: TemplateSource) -> ServerApp:
    if template != TemplateSource():
        return ServerApp(engine, settings, template)
    with mock.patch.object(server_app, "ChatTemplate", return_value=kept_template()):
        return ServerApp(engine, settings, template)


@asynccontextmanager
async def client_of(
    engine: Any,
    settings: ServerSettings | None = None,
    template: TemplateSource | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process; the engine is closed after it."""
    app = new_app(engine, settings or ServerSettings(), template or TemplateSource())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url=BASE_URL, headers=headers
        ) as client:
            client.app = app  # type: ignore[attr-defined]
            yield client
    finally:
        app.close()


@contextmanager
def listening(engine: ServingEngine, settings: ServerSettings | None = None) -> Iterator[str]:
    """The address of a server that runs in a thread; it asks for KEY."""
    given_settings = settings or ServerSettings(port=0, api_keys=(KEY,), drain_s=2.0)
    with bind(given_settings) as taken:
        app = new_app(engine, given_settings, TemplateSource())
        server = make_server(app, given_settings)
        thread = threading.Thread(target=server.run, args=([taken],))
        thread.start()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for _ in range(1000):
            if server.started:
                break
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


async def settled(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


async def chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"messages": HELLO} | fields
    return await client.post("/v1/chat/completions", json=body)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, whose last is `[DONE]`."""
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    data = [block.removeprefix("data: ") for block in blocks[:-1]]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def streamed(parts: Sequence[Any], index: int, name: str = "content") -> str:
    choices = [choice for event in parts for choice in event["choices"]]
    return "".join(
        choice["delta"].get(name) or "" for choice in choices if choice["index"] == index
    )


def message(response: httpx.Response) -> str:
    """The text of an error, which has OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def post_scope(path: str) -> dict[str, Any]:
    """What ASGI says of a POST with a JSON body."""
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


async def disconnecting(
    app: Any, body: Mapping[str, Any], after: int, path: str = "/v1/chat/completions"
) -> list[dict]:
    """Ask as a client that leaves after so many messages of the response."""
    sent: list[dict] = []
    gone = asyncio.Event()
    if after == 0:
        asyncio.get_running_loop().call_later(0.1, gone.set)
    inbox = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict:
        if inbox:
            return inbox.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(said: dict) -> None:
        sent.append(said)
        if len(sent) == after:
            gone.set()

    await asyncio.wait_for(app(post_scope(path), receive, send), 300)
    return sent
