"""Chat templates: where they come from, and their rendering in a process of its own."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sevenfold.config import CheckpointError
from sevenfold.server.errors import ApiError, bad_request

MAX_TEMPLATE_CHARS = 256 << 10
_START_S = 60.0  # a busy machine takes seconds to start a process
_WORKER = Path(__file__).with_name("template_worker.py")
# Of the time for a conversation; what is left is for whatever the worker is slow at.
_SPARE_SHARE = 0.25
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

# For a checkpoint that has none: plain lines, which any text model can go on from.
DEFAULT_TEMPLATE = """\
{% if tools %}
Tools: {{ tools | tojson }}
To call one, answer with <tool_calls>
{"name": <tool name>, "arguments": <object>}
</tool_calls>

{% endif %}
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_calls>
{{ call.function | tojson }}
</tool_calls>
{%- endfor +%}
{% endfor %}
{% if add_generation_prompt %}
Assistant:{% endif %}
"""


@dataclass(frozen=True)
class TemplateSource:
    """A chat template's text, the special tokens that it may name, and what ends an answer."""

    text: str = DEFAULT_TEMPLATE
    variables: Mapping[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ("\nUser:", "\nSystem:")


def read_template(folder: Path) -> TemplateSource:
    """Read a checkpoint's chat template; the default one if it has none.

    Args:
        folder: of the checkpoint; chat_template.jinja goes before chat_template.json and
            tokenizer_config.json.

    Raises:
        CheckpointError: a file is no JSON, or holds no template where one should be.
    """
    config = _read_json(folder / "tokenizer_config.json")
    variables = {name: _token_text(config[name]) for name in _TOKENS if config.get(name)}
    file = folder / "chat_template.jinja"
    if file.is_file():
        text: Any = _read_text(file)
    else:
        text = _read_json(folder / "chat_template.json").get("chat_template")
        text = text or config.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = next((one["template"] for one in text if one.get("name") == "default"), None)
    if not text:
        return TemplateSource(variables=variables)
    if not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"{folder}: chat_template must be a text of at most {MAX_TEMPLATE_CHARS} characters"
        )
    return TemplateSource(text, variables, stop=())


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} must be text in UTF-8, got other bytes") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(_read_text(file))
    except ValueError as error:
        raise CheckpointError(f"{file} must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must be a JSON object, got a {type(values).__name__}")
    return values


@dataclass(frozen=True)
class Cut:
    """A conversation's first messages, one or more.

    num_content: characters, or parts, that the last of them keeps of its content; None keeps all.
    """

    num_messages: int
    num_content: int | None = None


@dataclass(frozen=True)
class Rendered:
    """A conversation's text.

    shared: for each cut, how many characters the text begins with in common with the cut's, which
        no answer's beginning follows; None for one that the template refuses or that was left out.
    """

    text: str
    shared: tuple[int | None, ...] = ()


class ChatTemplate:
    """Renders conversations by one worker process, which is killed when it takes too long."""

    def __init__(self, source: TemplateSource, timeout_s: float) -> None:
        """Start the worker.

        Raises:
            CheckpointError: the template cannot be compiled.
        """
        self.source, self.stop, self._timeout_s = source, source.stop, timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        try:
            with self._lock:
                answer = self._started()
        except ApiError as error:
            raise CheckpointError(f"chat_template must load: {error.detail}") from error
        if "error" in answer:
            self.close()
            raise CheckpointError(f"chat_template must be a Jinja template: {answer['error']}")
        self.takes_tools, self.takes_parts = answer["tools"], answer["parts"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        cuts: Sequence[Cut] = (),
    ) -> Rendered:
        """Return the text of a conversation; blocks, so call it from a thread.

        Args:
            messages: the answer's beginning follows them.
            tools: what the answer may call.
            cuts: shorter conversations, those that matter most first. They cost no request its
                answer: of a long text the first six are rendered, and those for which a quarter
                of the time does not suffice are left out.

        Raises:
            ApiError: the template refuses the messages, or takes too long.
        """
        job = {
            "messages": messages,
            "tools": tools,
            "cuts": [(cut.num_messages, cut.num_content) for cut in cuts],
            "spare_s": _SPARE_SHARE * self._timeout_s,
        }
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._started()
            answer = self._ask(job, self._timeout_s)
        if "error" in answer:
            raise bad_request(
                f"messages must suit the model's chat template: {answer['error']}", "messages"
            )
        return Rendered(answer["text"], tuple(answer["shared"]))

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._stop()

    def _started(self) -> dict[str, Any]:
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={},
            encoding="ascii",
        )
        job = {"source": self.source.text, "variables": dict(self.source.variables)}
        return self._ask(job, _START_S)

    def _ask(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise AssertionError("the worker was started with pipes")
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self._stop()
        raise ApiError(
            400,
            f"messages must render within {timeout_s:g} s and the renderer's memory",
            param="messages",
            code="template_limit",
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what it had not read is of no use any more
        process.wait()
