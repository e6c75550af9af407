"""From conversations and texts to the tokens that an engine gets."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sevenfold.engine.token_ids import TokenIds
from sevenfold.server.api_chat import Message, TextPart, Tool
from sevenfold.server.api_common import MAX_CACHE_MARKS
from sevenfold.server.chat_template import ChatTemplate, Cut
from sevenfold.server.codec import Codec
from sevenfold.server.errors import bad_request
from sevenfold.server.output_parser import OPEN
from sevenfold.server.settings import ServerSettings

_SYSTEM = ("system", "developer")
_MOST_TURN_ENDS = 8  # each is rendered


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from.

    marks: rising token counts at which a turn of the conversation, or what its caller marked, ends.
    thinking: the prompt has opened the answer's reasoning.
    """

    ids: tuple[int, ...]
    marks: tuple[int, ...] = ()
    thinking: bool = False


class Prompts:
    """Makes prompts of what requests bring; long work leaves the event loop."""

    def __init__(self, codec: Codec, template: ChatTemplate, settings: ServerSettings) -> None:
        self._codec, self._template, self._settings = codec, template, settings

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> Prompt:
        """Render and encode a conversation, and what its answer may call.

        Raises:
            ApiError: it is too long, or does not suit the template.
        """
        most = self._settings.max_messages
        if len(messages) > most:
            raise bad_request(f"messages must be at most {most}, got {len(messages)}", "messages")
        if tools and not self._template.takes_tools:
            raise bad_request(
                "tools must be left out: the model's chat template has no place for them", "tools"
            )
        ends = _turn_ends(messages)
        asked = [self._cut(messages, *one) for one in _asked_cuts(messages)]
        cuts = list(dict.fromkeys([*map(Cut, ends[:2]), *asked, *map(Cut, ends[2:])]))
        made = [self._message(n, message) for n, message in enumerate(messages)]
        shown = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        return await asyncio.to_thread(self._chat, made, cuts, shown or None)

    async def text(self, text: str, param: str) -> Prompt:
        """Encode a text."""
        return await asyncio.to_thread(self._text, text, param)

    def _text(self, text: str, param: str) -> Prompt:
        return Prompt(TokenIds(self._codec.encode(text, param)))

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        cuts: Sequence[Cut],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Prompt:
        rendered = self._template.render(messages, tools, cuts)
        text, places = rendered.text, [place for place in rendered.shared if place]
        ids, marks = self._codec.encode_marked(text, places, "messages")
        return Prompt(TokenIds(ids), marks, text.rstrip().endswith(OPEN))

    def _cut(self, messages: Sequence[Message], index: int, num_parts: int | None) -> Cut:
        content = messages[index].content
        if num_parts is None or not isinstance(content, list) or num_parts == len(content):
            return Cut(index + 1)
        kept = self._content(content[:num_parts])
        return Cut(index + 1, len(kept))

    def _message(self, index: int, message: Message) -> dict[str, Any]:
        role = "system" if message.role == "developer" else message.role
        made: dict[str, Any] = {"role": role, "content": self._content(message.content)}
        named = {
            "name": message.name,
            "reasoning_content": _reasoning(message, index),
            "tool_call_id": message.tool_call_id,
        }
        made |= {name: value for name, value in named.items() if value is not None}
        if message.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, index),
                    },
                }
                for call in message.tool_calls
            ]
        return made

    def _content(self, content: str | Sequence[TextPart] | None) -> Any:
        texts = (
            [content or ""]
            if isinstance(content, str) or content is None
            else [part.text for part in content]
        )
        if self._template.takes_parts:
            return [{"type": "text", "text": text} for text in texts]
        return "\n".join(texts)


def check_length(
    prompt: Prompt, max_tokens: int | None, default: int, codec: Codec, param: str
) -> int:
    """Return how many tokens may follow a prompt.

    Args:
        prompt: what comes first.
        max_tokens: what the request asks for; None takes what is left, at most default.
        default: tokens.
        codec: knows the context's length and the vocabulary.
        param: what the prompt is called in errors.

    Raises:
        ApiError: the two do not fit, or the prompt is empty or names a token that there is not.
    """
    limit, length = codec.max_context_tokens, len(prompt.ids)
    if length == 0:
        raise bad_request(f"{param} must have at least one token", param)
    if max(prompt.ids) >= codec.vocab_size:
        raise bad_request(
            f"{param} must hold tokens below {codec.vocab_size}, got {max(prompt.ids)}", param
        )
    asked = max_tokens or max(1, min(default, limit - length))
    if length + asked > limit:
        raise bad_request(
            f"{param} and max_tokens must fit into the model's context of {limit} tokens, got "
            f"{length} + {asked} = {length + asked}",
            param,
            "context_length_exceeded",
        )
    return asked


def _reasoning(message: Message, index: int) -> str | None:
    both = (message.reasoning_content, message.reasoning)
    told = {value for value in both if value is not None}
    if len(told) > 1:
        where = f"messages.{index}.reasoning"
        raise bad_request(f"{where} must be reasoning_content if both are given", where)
    return next(iter(told), None)


def _arguments(text: str, index: int) -> dict[str, Any]:
    # Templates expect an object here, the API's form is text.
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        where = f"messages.{index}.tool_calls"
        raise bad_request(f"{where}: arguments must be a JSON object as text", where)
    return arguments


def _turn_ends(messages: Sequence[Message]) -> list[int]:
    """Messages after which a mark pays, the first the most.

    The next request of this conversation parts after all of them, or after all but 1, 2, 4, 8, ...,
    and another with its system prompt after that.
    """
    roles = [message.role for message in messages]
    num_system = next((n for n, role in enumerate(roles) if role not in _SYSTEM), 0)
    back = [len(messages) - 2**n for n in range(_MOST_TURN_ENDS - 1)]
    ends = [len(messages), num_system, *(end for end in back if end > num_system)]
    return [end for end in dict.fromkeys(ends) if end > 0]


def _asked_cuts(messages: Sequence[Message]) -> list[tuple[int, int | None]]:
    """Which messages their caller marked, and how many parts there are up to each mark."""
    cuts = []
    for n, message in enumerate(messages):
        parts = message.content if isinstance(message.content, list) else []
        for end, part in enumerate(parts, 1):
            if part.cache_control is not None:
                cuts.append((n, end))
        if message.cache_control is not None:
            cuts.append((n, None))
    if len(cuts) > MAX_CACHE_MARKS:
        raise bad_request(
            f"cache_control must be given {MAX_CACHE_MARKS} times at most, got {len(cuts)}",
            "messages",
        )
    return cuts
