"""The process that renders chat templates: a checkpoint's template is code from elsewhere.

Run as a file, so that it imports neither torch nor this package. It reads one JSON object a line
and answers with one; whoever started it kills it when it takes too long.

    {"source": str, "variables": {...}}           -> {"tools": bool, "parts": bool}
    {"messages": [...], "tools": [...] | null,
     "cuts": [[num_messages, num_content | null]],
     "spare_s": float}                            -> {"text": str, "shared": [int | null]}
    anything that goes wrong                      -> {"error": str}

The text is the whole conversation's. A cut is its first messages, of which the last may keep but
the beginning of its content; shared says how many characters the cut's text begins with in common.
Null stands where the template refuses a cut, or where its text would cost too much: cuts are
rendered last, one after the other, until spare_s seconds of the job are gone.
"""

import datetime
import json
import resource
import signal
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 30
MAX_RENDERED_CHARS = 32 << 20
# Of a longer text only the first few cuts are rendered: others wait for the worker meanwhile.
MAX_CUT_CHARS = 1 << 20
NUM_CUTS_BEYOND = 6
_PROBE = "probe8f3a"


class _RefusedError(TemplateError):
    """The template itself says that the conversation is wrong."""


class _LateError(BaseException):
    """The time for cuts is over; no Exception, as those are faults of one cut."""


def _stop_cuts(*_: object) -> None:
    raise _LateError


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class Renderer:
    """One template in Jinja's immutable sandbox."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # What templates written for transformers expect.
        env.filters["tojson"] = _to_json
        env.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._template = env.from_string(source)
        self._variables = variables
        self.takes_tools = "tools" in meta.find_undeclared_variables(env.parse(source))
        self.takes_parts = self._needs_parts()

    def render(self, messages: list[dict[str, Any]], tools: Any, generate: bool) -> str:
        """Return the prompt of a conversation."""
        pieces: list[str] = []
        size = 0
        values = {"messages": messages, "add_generation_prompt": generate, "tools": tools}
        for piece in self._template.generate(self._variables | values):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise TemplateError(f"the prompt must have at most {MAX_RENDERED_CHARS} characters")
        return "".join(pieces)

    def _needs_parts(self) -> bool:
        """Whether a message's content must be a list of parts, as MiniMax-01's template has it."""

        def shows(content: Any) -> bool:
            try:
                text = self.render([{"role": "user", "content": content}], None, True)
            except Exception:  # a template may fail in any way that Python can
                return False
            return _PROBE in text

        return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def num_shared(text: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    if text.startswith(other):
        return len(other)
    lengths = range(1, len(other) + 1)
    return bisect_left(lengths, True, key=lambda n: not text.startswith(other[:n]))


def _rendered(renderer: Renderer, job: dict[str, Any], began_s: float) -> dict[str, Any]:
    text = renderer.render(job["messages"], job["tools"], True)
    shared: list[int | None] = [None] * len(job["cuts"])
    left_s = began_s + job["spare_s"] - time.monotonic()
    if left_s <= 0:
        return {"text": text, "shared": shared}
    num = len(shared) if len(text) <= MAX_CUT_CHARS else NUM_CUTS_BEYOND
    try:
        signal.setitimer(signal.ITIMER_REAL, left_s)
        for n, cut in enumerate(job["cuts"][:num]):
            shared[n] = _shared(renderer, job, text, cut)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _LateError:
        pass
    return {"text": text, "shared": shared}


def _shared(
    renderer: Renderer, job: dict[str, Any], text: str, cut: list[int | None]
) -> int | None:
    num_messages, num_content = cut
    messages = job["messages"][:num_messages]
    if num_content is not None:
        messages[-1] = messages[-1] | {"content": messages[-1]["content"][:num_content]}
    try:
        return num_shared(text, renderer.render(messages, job["tools"], False))
    except Exception:  # a template may fail in any way that Python can
        return None


def _answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    """Serve the parent until it closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    signal.signal(signal.SIGALRM, _stop_cuts)
    renderer: Renderer | None = None

    def load(job: dict[str, Any]) -> dict[str, Any]:
        nonlocal renderer
        renderer = Renderer(job["source"], job["variables"])
        return {"tools": renderer.takes_tools, "parts": renderer.takes_parts}

    def work(line: str) -> dict[str, Any]:
        began_s = time.monotonic()
        job = json.loads(line)
        return load(job) if renderer is None else _rendered(renderer, job, began_s)

    for line in sys.stdin:
        answer = _answered(lambda line=line: work(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
