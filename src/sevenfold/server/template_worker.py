"""The process that renders chat templates: a checkpoint's template is code from elsewhere.

Run as a file, so that it imports neither torch nor this package. It reads one JSON object a line
and answers with one; whoever started it kills it when it takes too long.

    {"source": str, "variables": {...}}                          -> {"tools": bool, "parts": bool}
    {"tools": [...] | null, "renders": [[messages, generate]]}   -> {"texts": [str | null]}
    anything that goes wrong                                     -> {"error": str}

Of several renders only the first must succeed; another that fails is null.
"""

import datetime
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 30
MAX_RENDERED_CHARS = 32 << 20
_PROBE = "probe8f3a"


class _RefusedError(TemplateError):
    """The template itself says that the conversation is wrong."""


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


def _texts(renderer: Renderer, job: dict[str, Any]) -> dict[str, Any]:
    texts: list[str | None] = []
    for messages, generate in job["renders"]:
        try:
            texts.append(renderer.render(messages, job["tools"], generate))
        except Exception:
            if not texts:
                raise
            texts.append(None)
    return {"texts": texts}


def _answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    """Serve the parent until it closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    renderer: Renderer | None = None

    def load(job: dict[str, Any]) -> dict[str, Any]:
        nonlocal renderer
        renderer = Renderer(job["source"], job["variables"])
        return {"tools": renderer.takes_tools, "parts": renderer.takes_parts}

    def work(line: str) -> dict[str, Any]:
        job = json.loads(line)
        return load(job) if renderer is None else _texts(renderer, job)

    for line in sys.stdin:
        answer = _answered(lambda line=line: work(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
