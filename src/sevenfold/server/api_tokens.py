"""Requests and answers of /tokenize, /detokenize, /v1/models, /health and /ready."""

from typing import Annotated, Literal

from pydantic import Field

from sevenfold.server.api_chat import Message, Tool
from sevenfold.server.api_common import ApiAnswer, ApiRequest, Token


class TokenizeRequest(ApiRequest):
    """A text, or a conversation as the model's template puts it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    # As in ForeignFields: the tokens are those that an answer would follow.
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None


class Tokens(ApiAnswer):
    """The tokens of a text; marks are the counts after which a conversation's state may be kept."""

    tokens: list[int]
    count: int
    marks: list[int]
    max_model_len: int


class DetokenizeRequest(ApiRequest):
    """Tokens."""

    model: str | None = None
    tokens: list[Token]


class Text(ApiAnswer):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(ApiAnswer):
    """What a client needs to know of the tokenizer; null for a token that there is not."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str
    model_max_length: int
    vocab_size: int


class Model(ApiAnswer):
    """A model that is served; max_model_len is its context in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sevenfold"] = "sevenfold"
    max_model_len: int


class Models(ApiAnswer):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(ApiAnswer):
    """How the server is."""

    status: Literal["ok", "stalled", "draining", "warming_up"]


class Version(ApiAnswer):
    """Which release answers."""

    version: str
