"""Tool calls in a model's text.

Three forms are read: MiniMax-M1's `<tool_calls>`, one JSON object a line; `<tool_call>` around each
object, as many other models have it; and an answer that is nothing but such an object.
"""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

CLOSING = {"<tool_calls>": "</tool_calls>", "<tool_call>": "</tool_call>"}
# JSON's, and that of the grammar of strict calls: what one reads as a call the other must as well.
SPACE = " \t\r\n"
_BARE = re.compile(rf'\{{[{SPACE}]*"name"[{SPACE}]*:')
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class ParsedCall:
    """One call; arguments is JSON text."""

    id: str
    name: str
    arguments: str


def take_call(text: str) -> tuple[ParsedCall | None, str]:
    """Take the first call off a text that begins with one.

    Returns:
        The call and what follows it; None and the whole text while it is incomplete or no call.
    """
    body = text.lstrip(SPACE + ",")
    try:
        value, end = _decoder.raw_decode(body)
    except (json.JSONDecodeError, RecursionError):
        return None, text
    call = _as_call(value)
    return (None, text) if call is None else (call, body[end:])


def may_be_bare_call(text: str) -> bool:
    """Whether a text is, or may become, an answer that is nothing but a call."""
    begun = text.lstrip(SPACE)
    return not begun or bool(_BARE.match(begun)) or _begins_bare(begun)


def _begins_bare(begun: str) -> bool:
    squeezed = re.sub(f"[{SPACE}]", "", begun)
    return '{"name":'.startswith(squeezed)


def _as_call(value: Any) -> ParsedCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON, as some models write it
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return ParsedCall(f"call_{secrets.token_hex(12)}", value["name"], text)
