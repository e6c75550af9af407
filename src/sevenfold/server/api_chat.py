"""Requests and answers of /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from sevenfold.server.api_common import (
    MAX_LOGPROBS,
    ApiAnswer,
    ApiRequest,
    SamplingFields,
    Usage,
)

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
FinishReason = Literal["stop", "length", "tool_calls"]


class CacheControl(ApiRequest):
    """A mark at the end of a message or part: other requests will share the prompt up to it."""

    type: Literal["ephemeral"]


class TextPart(ApiRequest):
    """A part of a message; text is all that there is, so nothing is ever fetched."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class CalledFunction(ApiRequest):
    """A call that an earlier answer made; arguments is a JSON object, as text."""

    name: ToolName
    arguments: str


class PastToolCall(ApiRequest):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(ApiRequest):
    """One message of a conversation; reasoning is another name of reasoning_content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    # vllm-router renames reasoning_content so, on the way to a server.
    reasoning: str | None = None
    tool_calls: list[PastToolCall] | None = None
    tool_call_id: str | None = None
    cache_control: CacheControl | None = None
    # OpenAI's client sends these back with an answer's message, empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: None = None


class ToolFunction(ApiRequest):
    """What an answer may call; parameters is a JSON schema, which strict makes arguments follow."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiRequest):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(ApiRequest):
    """Which function must be called."""

    name: ToolName


class NamedTool(ApiRequest):
    """Which tool must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(ApiRequest):
    """Which of the tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedToolChoice(ApiRequest):
    """A choice among some of the tools; the prompt shows all of them."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(SamplingFields):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # As ForeignFields: an answer begins a turn, and its reasoning comes apart and as a stream.
    continue_final_message: Literal[False] | None = None
    separate_reasoning: Literal[True] | None = None
    stream_reasoning: Literal[True] | None = None
    include_reasoning: Literal[True] | None = None


class TopLogprob(ApiAnswer):
    """One of the most probable tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token at a place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(ApiAnswer):
    """Log probabilities of all tokens of an answer."""

    content: list[TokenLogprob]


class AnswerFunction(ApiAnswer):
    """The function called; arguments is JSON text."""

    name: str
    arguments: str


class AnswerToolCall(ApiAnswer):
    """A tool call."""

    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(ApiAnswer):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None
    tool_calls: list[AnswerToolCall] | None


class ChatChoice(ApiAnswer):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(ApiAnswer):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
