"""Schemas, regular expressions and grammars, compiled by llguidance into masks over tokens."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from sevenfold.server.api_common import ResponseFormat
from sevenfold.server.errors import ApiError, bad_request
from sevenfold.server.settings import ServerSettings

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED_GRAMMARS = 64
# Without a bound an unsure model may write white space for ever.
_WHITE_SPACE = r"[ \n]{0,20}"


@dataclass(frozen=True)
class Grammar:
    """What an output must match: source is in llguidance's form, param names it in errors."""

    source: str
    param: str


class Compiler:
    """Compiles grammars for one tokenizer, one at a time, and remembers the latest."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_id: int | None,
        settings: ServerSettings,
    ) -> None:
        self._build = (tokenizer, vocab_size, eos_token_id)
        self._settings = settings
        self._tokenizer: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = asyncio.Lock()

    async def compile(self, grammar: Grammar) -> "Constraint":
        """Return a fresh constraint.

        Raises:
            ApiError: the grammar is wrong, or too costly to compile.
        """
        async with self._lock:
            matcher = self._matchers.get(grammar.source)
            if matcher is None:
                matcher = await self._compiled(grammar)
                self._matchers[grammar.source] = matcher
            self._matchers.move_to_end(grammar.source)
            if len(self._matchers) > _CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
        return Constraint(matcher.deep_copy())

    async def _compiled(self, grammar: Grammar) -> "LLMatcher":
        work = asyncio.to_thread(self._match, grammar.source)
        try:
            # llguidance bounds its own work; the time bounds how long anybody waits for it.
            matcher = await asyncio.wait_for(work, self._settings.grammar_timeout_s)
        except ValueError as error:
            raise bad_request(
                f"{grammar.param} must be left out: llguidance cannot use this model's tokenizer: "
                f"{error}",
                grammar.param,
                "unsupported_parameter",
            ) from error
        except TimeoutError as error:
            limit = self._settings.grammar_timeout_s
            raise bad_request(
                f"{grammar.param} must compile within {limit} s", grammar.param
            ) from error
        if matcher.is_error():
            said = matcher.get_error().split("\n")[0][:300]
            raise bad_request(f"{grammar.param} must be valid: {said}", grammar.param)
        return matcher

    def _match(self, source: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            tokenizer, vocab_size, eos = self._build
            self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=eos)
        return LLMatcher(self._tokenizer, source, log_level=0)


class Constraint:
    """One output's place in its grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def fill(self, mask: np.ndarray) -> None:
        """Write the allowed tokens, one bit each, into a row [ceil(vocab_size / 32)] int32."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, mask[None])

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; False if it may not follow."""
        return self._matcher.consume_token(token_id)

    def finished(self) -> bool:
        """Whether nothing more can follow, so that the output ends with "stop"."""
        return self._matcher.is_stopped()


def format_grammar(body: ResponseFormat | None, settings: ServerSettings) -> Grammar | None:
    """Return the grammar of a response_format; None for free text.

    Raises:
        ApiError: what the type asks for is missing, beside another's, or too long.
    """
    if body is None:
        return None
    given = [n for n in ("json_schema", "regex", "grammar") if getattr(body, n) is not None]
    wanted = [] if body.type in ("text", "json_object") else [body.type]
    if given != wanted:
        raise bad_request(
            f"response_format of type {body.type} must have {' and '.join(wanted) or 'no more'}, "
            f"got {', '.join(given) or 'none'}",
            "response_format",
        )
    if body.type == "json_object":
        return _schema({"type": "object"}, "response_format", settings)
    if body.json_schema is not None:
        return _schema(body.json_schema.schema_, "response_format.json_schema.schema", settings)
    if body.regex is not None:
        return _regex(body.regex, "response_format.regex", settings)
    if body.grammar is not None:
        param = "response_format.grammar"
        _check_length(body.grammar, settings.max_grammar_chars, param)
        return Grammar(_matcher().grammar_from_lark(body.grammar), param)
    return None


def call_grammar(
    tools: Sequence[Mapping[str, Any]], settings: ServerSettings, param: str = "tools"
) -> Grammar:
    """Return the grammar of one call of one of the tools, as a JSON object."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": _rebased(
                    {"type": "object"} | (tool.get("parameters") or {}),
                    f"#/anyOf/{n}/properties/arguments",
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for n, tool in enumerate(tools)
    ]
    return _schema({"anyOf": calls}, param, settings)


def _rebased(node: Any, place: str) -> Any:
    """A schema whose references to its own parts hold where it stands within another."""
    if isinstance(node, list):
        return [_rebased(one, place) for one in node]
    if not isinstance(node, Mapping):
        return node
    made = {key: _rebased(value, place) for key, value in node.items()}
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        made["$ref"] = place + reference[1:]
    return made


def _schema(schema: Mapping[str, Any], param: str, settings: ServerSettings) -> Grammar:
    text = json.dumps(schema)
    _check_length(text, settings.max_grammar_chars, param)
    for pattern in _patterns(schema):
        _check_length(pattern, settings.max_regex_chars, f"{param}: pattern")
    try:
        return Grammar(
            _matcher().grammar_from_json_schema(
                text, defaults={"whitespace_pattern": _WHITE_SPACE}
            ),
            param,
        )
    except ValueError as error:
        raise bad_request(f"{param} must be a JSON schema: {error}", param) from error


def _regex(pattern: str, param: str, settings: ServerSettings) -> Grammar:
    _check_length(pattern, settings.max_regex_chars, param)
    return Grammar(_matcher().grammar_from_regex(pattern), param)


def _patterns(schema: Any) -> list[str]:
    """Every regular expression that a schema holds, at any depth."""
    found, left = [], [schema]
    while left:
        node = left.pop()
        if isinstance(node, Mapping):
            found += [node["pattern"]] if isinstance(node.get("pattern"), str) else []
            properties = node.get("patternProperties")
            found += list(properties) if isinstance(properties, Mapping) else []
            left += node.values()
        elif isinstance(node, list):
            left += node
    return found


def _check_length(text: str, most: int, param: str) -> None:
    if len(text) > most:
        raise bad_request(f"{param} must have at most {most} characters, got {len(text)}", param)


def _matcher() -> "type[LLMatcher]":
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise ApiError(
            400,
            "response_format and forced tool calls need llguidance, which this server lacks; "
            "pip install 'sevenfold[serve]' brings it",
            param="response_format",
            code="unsupported_parameter",
        ) from error
    return LLMatcher
