"""The trained model behind the server on this machine, asked through the openai client."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sevenfold.config import ConfigError

if TYPE_CHECKING:
    from openai import OpenAI

MEMORY_BYTES = 256 << 20
ANSWER_TOKENS = 48
MODEL_NAME = "nano-hybrid"
OPENING = (
    "It was a fine evening in October when Mr. Weston came into the room, and every body was "
    "curious to know what he had heard in the town. He had seen Miss Bates, who had seen Mrs. "
    "Cole, who had been told by the housekeeper herself that a family of some consequence was "
    "expected at the great house before the end of the month; and he had walked home as fast as "
    "he could to be the first to tell it. What does he say to them?"
)


@dataclass(frozen=True)
class Chat:
    """Two turns of a conversation, and how much of the second was cached."""

    answers: tuple[str, str]
    prompt_tokens: int
    cached_tokens: int


def ask_served(checkpoint: Path) -> Chat:
    """Serve a checkpoint on a free port of this machine and hold a conversation of two turns.

    Raises:
        ConfigError: the server or the openai client is not installed.
    """
    try:
        from openai import OpenAI

        import sevenfold.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"demo: {error.name} must be installed; pip install 'sevenfold[serve,demo]' brings it"
        ) from error
    with _serving(checkpoint) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        messages: list[Any] = [{"role": "user", "content": OPENING}]
        first, _, _ = _answer(client, messages)
        messages.append({"role": "assistant", "content": first})
        messages.append({"role": "user", "content": "And what do they answer?"})
        second, prompt_tokens, cached_tokens = _answer(client, messages)
    return Chat((first, second), prompt_tokens, cached_tokens)


def _answer(client: "OpenAI", messages: list[Any]) -> tuple[str, int, int]:
    """Stream an answer: its text, the prompt's tokens, and those that were cached."""
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,
        max_tokens=ANSWER_TOKENS,
        temperature=0.8,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    details = None if usage is None else usage.prompt_tokens_details
    if usage is None or details is None:
        raise AssertionError("the server sends usage when it is asked to")
    return text, usage.prompt_tokens, details.cached_tokens or 0


@contextmanager
def _serving(checkpoint: Path) -> Iterator[str]:
    """The address of a server in a thread, which ends with the block."""
    from sevenfold.engine import TextModel
    from sevenfold.engine.sizing import size_engine
    from sevenfold.server import (
        BatchingEngine,
        ServerApp,
        ServerSettings,
        bind,
        make_server,
        read_template,
    )

    settings = ServerSettings(port=0)
    with bind(settings) as taken:
        source = TextModel.load(checkpoint)
        plan, limits = size_engine(source.model, budget_bytes=MEMORY_BYTES)
        engine = BatchingEngine(source, MODEL_NAME, plan, limits)
        server = make_server(ServerApp(engine, settings, read_template(checkpoint)), settings)
        thread = threading.Thread(target=server.run, args=([taken],))
        thread.start()
        try:
            # The port listens already: a client waits in its queue until the server is up.
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
