"""What requests and answers of several endpoints share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sevenfold.engine.request_options import Priority
from sevenfold.engine.sampling.params import Bias, Penalty, Repetition, Temperature

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20

MAX_CACHE_MARKS = 4  # as in the interfaces that cache_control comes from

Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class ApiRequest(BaseModel):
    """A body that refuses what it does not know, and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ApiAnswer(BaseModel):
    """What goes back."""

    model_config = ConfigDict(frozen=True)


class ForeignFields(ApiRequest):
    """Parameters of other servers that routers and clients write into every body.

    Only the value that says what this server does anyway is taken, so that none is ignored.
    """

    # Written by vllm-router 0.1.17 and sglang-router 0.3.2, from the defaults of their own types.
    no_stop_trim: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    return_hidden_states: Literal[False] | None = None


class StreamOptions(ApiRequest):
    """What a stream carries besides text: usage at its end, or usage so far with every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class SchemaFormat(ApiRequest):
    """A JSON schema that an output shall follow; all of them are followed strictly."""

    name: Annotated[str, Field(max_length=128)] = "answer"
    description: str | None = None
    # `schema` is a method of pydantic's models.
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiRequest):
    """What form an output shall have; regex and grammar (Lark) go beyond OpenAI's interface."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: SchemaFormat | None = None
    regex: str | None = None
    grammar: str | None = None


class SamplingFields(ForeignFields):
    """How tokens are chosen and when an output ends; null is the same as left out."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(
        default=None, description="-1 and 0 keep all"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    bad_words: Annotated[list[Stop], Field(max_length=64)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: Priority = 0
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="for the caller's own records; changes nothing"
    )


class PromptDetails(ApiAnswer):
    """How much of the prompt was cached; if nothing, why."""

    cached_tokens: int
    cache_miss_reason: str | None


class Usage(ApiAnswer):
    """Tokens of one request, over all its outputs."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ErrorDetail(ApiAnswer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ApiAnswer):
    """Every error has this shape."""

    error: ErrorDetail
