"""An answer of a conversation put together, and how its log probabilities are shown."""

from collections.abc import Sequence
from typing import Any, cast

from sevenfold.engine.sampling import Logprobs
from sevenfold.server.api_chat import (
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChoiceLogprobs,
    FinishReason,
    TokenLogprob,
)
from sevenfold.server.codec import Codec
from sevenfold.server.output_parser import Part

# What OpenAI's interface shows for a probability of zero; JSON has no infinity.
LEAST_LOGPROB = -9999.0


class AnswerBuilder:
    """Collects the parts of one answer."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self._calls: list[AnswerToolCall] = []
        self._logprobs: list[dict[str, Any]] = []
        self._reason: str | None = None

    def add(
        self,
        parts: Sequence[Part],
        logprobs: list[dict[str, Any]] | None,
        reason: str | None,
    ) -> None:
        """Take what one token brought."""
        self._logprobs += logprobs or []
        self._reason = reason or self._reason
        for part in parts:
            if part.call is None:
                self._texts[part.kind].append(part.text)
            else:
                function = AnswerFunction(name=part.call.name, arguments=part.call.arguments)
                self._calls.append(AnswerToolCall(id=part.call.id, function=function))

    def choice(self, with_logprobs: bool) -> ChatChoice:
        """Return the answer."""
        content, reasoning = ("".join(self._texts[kind]) for kind in ("content", "reasoning"))
        shown = [TokenLogprob.model_validate(one) for one in self._logprobs]
        return ChatChoice(
            index=self._index,
            message=AnswerMessage(
                content=content if content or not self._calls else None,
                reasoning_content=reasoning or None,
                tool_calls=self._calls or None,
            ),
            logprobs=ChoiceLogprobs(content=shown) if with_logprobs else None,
            finish_reason=cast(FinishReason, self._reason),
        )


def token_logprobs(token: int, logprobs: Logprobs, codec: Codec) -> dict[str, Any]:
    """Return a token's log probability, and those of the most probable ones at its place."""
    top = [_one(other, value, codec) for other, value in logprobs.top]
    return _one(token, logprobs.chosen, codec) | {"top_logprobs": top}


def _one(token: int, value: float, codec: Codec) -> dict[str, Any]:
    content = codec.token_bytes(token)
    return {
        "token": content.decode("utf-8", "replace"),
        "logprob": max(value, LEAST_LOGPROB),
        "bytes": list(content),
    }
