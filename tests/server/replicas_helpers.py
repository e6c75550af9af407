"""Two replicas behind a router that nobody here wrote: shared out, killed, drained, restarted."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from process_helpers import Program, free_port, listening_at, save_tiny, serving, wait_until

KEYS = ("a key of some length", "another one, as long")
CONTEXT_OPTIONS = ("--model-name", "tiny", "--memory-gib", "0.1", "--drain", "20")
AT_A_TIME = 16
TURNS = 3
Message = dict[str, Any]


@contextmanager
def routed(
    command: Sequence[str], replicas: Sequence[Program], *, policy: str = "cache_aware"
) -> Iterator[str]:
    """The address of a router before replicas, whose health it checks every second."""
    port = free_port()
    options = ("--host", "127.0.0.1", "--port", str(port), "--policy", policy)
    options += ("--prometheus-port", str(free_port()), "--health-check-interval-secs", "1")
    options += ("--health-failure-threshold", "1", "--health-success-threshold", "1")
    # Of a replica that died with many requests the circuit stays open for a minute, back or not.
    options += ("--cb-timeout-duration-secs", "1")
    urls = ("--worker-urls", *(one.url for one in replicas))
    with listening_at((*command, *options, *urls), port, "/health") as program:
        yield program.url


def client(url: str, key: str = KEYS[0], **options: Any) -> openai.AsyncOpenAI:
    """OpenAI's client, which shows every failure: it repeats nothing."""
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120, **options
    )


async def answer(ask: openai.AsyncOpenAI, messages: list[Message], **more: Any) -> Any:
    """A greedy answer of eight tokens."""
    return await ask.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0.0, **more
    )


def openings(num: int, seed: int) -> list[list[Message]]:
    """First turns of conversations that have nothing in common."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    texts = ["".join(draw.choices(letters, k=draw.randint(70, 110))) for _ in range(num)]
    return [[{"role": "user", "content": text}] for text in texts]


async def converse(url: str, asked: list[list[Message]], headers: bool = False) -> dict[str, Any]:
    """Hold conversations of three turns, many at a time; count what was cached in later turns."""
    room, counts, texts = asyncio.Semaphore(AT_A_TIME), Counter[str](), {}

    async def one(ask: openai.AsyncOpenAI, n: int) -> None:
        messages, name = list(asked[n]), f"conversation {n}"
        more = {"extra_headers": {"X-Session-ID": name}} if headers else {}
        async with room:
            for turn in range(TURNS):
                made = await answer(ask, messages, **more)
                text = made.choices[0].message.content
                texts[n, turn] = text
                counts["requests"] += 1
                if turn:
                    cached = made.usage.prompt_tokens_details.cached_tokens
                    counts["later turns"] += 1
                    counts["later turns that hit"] += cached > 0
                    counts["their prompt tokens"] += made.usage.prompt_tokens
                    counts["their cached tokens"] += cached
                messages.append({"role": "assistant", "content": text})
                messages.append({"role": "user", "content": "and then?"})

    async with client(url) as ask:
        await asyncio.gather(*(one(ask, n) for n in range(len(asked))))
    return dict(counts) | {"texts": texts}


def responses(replica: Program, route: str = "/v1/chat/completions") -> int:
    """How many requests of a route a replica has answered with 200."""
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    lines = httpx.get(f"{replica.url}/metrics", headers=headers).text.splitlines()
    name = f'sevenfold_http_responses_total{{route="{route}",status="200"}}'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


async def interrupt(url: str, num: int, act: Any) -> Counter[str]:
    """Ask many times, and act when a third have been answered; count what clients saw."""
    room, counts = asyncio.Semaphore(AT_A_TIME), Counter[str]()
    asked = openings(num, seed=5)

    async def one(ask: openai.AsyncOpenAI, messages: list[Message]) -> None:
        async with room:
            try:
                await answer(ask, messages, extra_body={"ignore_eos": True})
                counts["answered"] += 1
            except openai.APIStatusError as error:
                counts[f"status {error.status_code}"] += 1
            except openai.APIConnectionError:
                counts["connection lost"] += 1
        if counts["answered"] == num // 3:
            await asyncio.to_thread(act)

    async with client(url) as ask:
        await asyncio.gather(*(one(ask, messages) for messages in asked))
    return counts


def healthy_workers(url: str) -> int:
    """How many replicas a router sends requests to."""
    workers = httpx.get(f"{url}/workers").json()["workers"]
    return sum(one["is_healthy"] for one in workers)


class Pair:
    """Two replicas of the tests' tiny model, with keys."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        keys = folder / "keys"
        keys.write_text("\n".join(KEYS))
        self._options = (*CONTEXT_OPTIONS, "--api-keys-file", str(keys))
        self._checkpoint, self._stack = save_tiny(folder / "tiny"), stack
        self.replicas = [self.start(), self.start()]

    def start(self, port: int | None = None) -> Program:
        """One more replica, or one in a dead one's place."""
        made = serving(self._checkpoint, *self._options, port=port)
        return self._stack.enter_context(made)

    def forget(self) -> None:
        """Empty the replicas' prefix caches."""
        for one in self.replicas:
            headers = {"Authorization": f"Bearer {KEYS[0]}"}
            url = f"{one.url}/reset_prefix_cache"
            httpx.post(url, json={}, headers=headers).raise_for_status()

    def restart(self, n: int) -> None:
        """Start a dead replica again at its address."""
        port = int(self.replicas[n].url.rpartition(":")[2])
        self.replicas[n] = self.start(port)


async def shared_out(url: str, pair: Pair, num: int, *, headers: bool = False) -> dict[str, Any]:
    """Conversations through a router: equal to those of one replica asked directly."""
    asked = openings(num, seed=num)
    pair.forget()
    before = [responses(one) for one in pair.replicas]
    told = await converse(url, asked, headers)
    shares = [responses(one) - old for one, old in zip(pair.replicas, before, strict=True)]
    pair.forget()
    alone = await converse(pair.replicas[0].url, asked)
    assert told.pop("texts") == alone.pop("texts"), "a router changes no answer"
    assert sum(shares) == told["requests"] == num * TURNS
    hits = {"later turns that hit, one replica asked directly": alone["later turns that hit"]}
    return told | hits | {"by replica": shares}


async def keys_pass(url: str) -> dict[str, Any]:
    """A router hands keys on: a wrong one is refused, and two share no cache."""
    [messages] = openings(1, seed=99)
    cached = []
    for key in (*KEYS, *KEYS):
        async with client(url, key) as ask:
            made = await answer(ask, messages)
            cached.append(made.usage.prompt_tokens_details.cached_tokens)
    async with client(url, "w" * 20) as ask:
        try:
            await answer(ask, messages)
        except openai.AuthenticationError as error:
            return {"wrong key": error.status_code, "cached by key, twice": cached}
    raise AssertionError("a wrong key must be refused")


async def streams_pass(url: str) -> dict[str, Any]:
    """A stream through a router says what the whole answer says."""
    [messages] = openings(1, seed=7)
    async with client(url) as ask:
        whole = await answer(ask, messages)
        stream = await answer(ask, messages, stream=True, stream_options={"include_usage": True})
        *parts, last = [part async for part in stream]
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    return {"chunks": len(parts) + 1, "completion tokens": last.usage.completion_tokens}


def lose_and_return(url: str, pair: Pair, num: int) -> list[dict[str, Any]]:
    """Kill a replica under load, start it again; drain the other under load, start it again."""
    cases = []
    for n, (name, act) in enumerate(
        (
            ("kill -9 under load", pair.replicas[0].kill),
            ("SIGTERM under load", lambda: pair.replicas[1].process.send_signal(signal.SIGTERM)),
        )
    ):
        counts = asyncio.run(interrupt(url, num, act))
        pair.replicas[n].process.wait(60)
        wait_until(lambda: healthy_workers(url) == 1)
        pair.restart(n)
        wait_until(lambda: healthy_workers(url) == 2)
        after = asyncio.run(interrupt(url, AT_A_TIME, lambda: None))
        assert after["answered"] == AT_A_TIME, (name, after)
        cases.append({"case": name, "requests": num} | dict(counts))
    return cases


def prove(command: Sequence[str], folder: Path, num: int) -> list[dict[str, Any]]:
    """Everything above, for a record.

    Args:
        command: the router's, without options.
        folder: for the checkpoint and the keys.
        num: conversations, and requests while a replica is lost.
    """
    cases: list[dict[str, Any]] = []
    with ExitStack() as stack:
        pair = Pair(stack, folder)
        for policy in ("cache_aware", "round_robin", "consistent_hash"):
            with routed(command, pair.replicas, policy=policy) as url:
                told = asyncio.run(shared_out(url, pair, num, headers=policy == "consistent_hash"))
            cases.append({"case": f"conversations, {policy}"} | told)
            num += 1  # other conversations than before: nothing of them is cached
        with routed(command, pair.replicas) as url:
            cases.append({"case": "keys"} | asyncio.run(keys_pass(url)))
            cases.append({"case": "stream"} | asyncio.run(streams_pass(url)))
            cases += lose_and_return(url, pair, 4 * num)
    return cases
