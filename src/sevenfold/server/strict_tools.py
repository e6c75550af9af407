"""Answers that may call tools, whose strict tools get arguments that follow their schemas."""

import json
from collections.abc import Sequence

from sevenfold.engine.grammar import WHITE_SPACE
from sevenfold.server.api_chat import ToolFunction
from sevenfold.server.constraints import AskedGrammar, check_schema, lark_grammar
from sevenfold.server.settings import ServerSettings

# What output_parser reads, in llguidance's form of Lark. A lazy rule ends at its first match, so
# that text goes over into a call where a tag, or a bare call's name, stands.
_FORM = r"""
start: {start}
body: bare? tagged* REST?
bare: bare_open WS call
tagged: lines SEP one (SEP one)* SEP "</tool_calls>" | single SEP one SEP "</tool_call>"
one: "{{" WS "\"name\"" WS ":" WS call
call: ({calls}) WS "}}"
think[lazy]: /[ \t\r\n]*<think>(.|\n)*<\/think>/
think_rest[lazy]: /(.|\n)*<\/think>/
bare_open[lazy]: /[ \t\r\n]*\{{[ \t\r\n]*"name"[ \t\r\n]*:/
lines[lazy]: TEXT "<tool_calls>"
single[lazy]: TEXT "<tool_call>"
ANYTHING: /(.|\n)*/
UNCLOSED: /[ \t\r\n]*<think>(.|\n)*/
REST: TEXT
TEXT: ANYTHING & ~UNCLOSED & ~/[ \t\r\n]*\{{[ \t\r\n]*"name"[ \t\r\n]*:(.|\n)*/
SEP: /[ \t\r\n,]{{0,20}}/
WS: /{space}/
"""
_START = "think body | body | UNCLOSED"
_START_THINKING = "think_rest body | ANYTHING"


def strict_grammar(
    tools: Sequence[ToolFunction], settings: ServerSettings, *, thinking: bool
) -> AskedGrammar | None:
    """Return the grammar of free text that may call tools; None if no tool is strict.

    An answer that begins as a call, or has a call's tag outside its reasoning, makes one.

    Args:
        tools: that may be called.
        settings: the limits of schemas.
        thinking: the prompt has opened the answer's reasoning.

    Raises:
        ApiError: a schema is too long.
    """
    if not any(tool.strict for tool in tools):
        return None
    calls = " | ".join(_call(tool, settings) for tool in tools)
    start = _START_THINKING if thinking else _START
    return lark_grammar(
        _FORM.format(start=start, calls=calls, space=WHITE_SPACE), "tools", settings
    )


def _call(tool: ToolFunction, settings: ServerSettings) -> str:
    """One call behind the word `name`, up to its last brace."""
    schema = {"type": "object"} | ((tool.parameters or {}) if tool.strict else {})
    check_schema(schema, "tools", settings)
    schema["x-guidance"] = {"whitespace_pattern": WHITE_SPACE}
    name = json.dumps(json.dumps(tool.name))
    return rf'{name} WS "," WS "\"arguments\"" WS ":" WS %json {json.dumps(schema)}'
