"""The schemas, regular expressions and grammars that requests bring: limits, errors, a memory."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import Tokenizer

from sevenfold.config import UnsupportedError
from sevenfold.engine.grammar import Grammar, GrammarCompiler, GrammarConstraint
from sevenfold.server.api_chat import ToolFunction
from sevenfold.server.api_common import ResponseFormat
from sevenfold.server.errors import ApiError, bad_request
from sevenfold.server.settings import ServerSettings

Source = TypeVar("Source")

_CACHED_GRAMMARS = 64


@dataclass(frozen=True)
class AskedGrammar:
    """A grammar that a request asks for; param names it in errors."""

    grammar: Grammar
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
        self._compiler = GrammarCompiler(tokenizer, vocab_size, eos_token_id)
        self._settings = settings
        self._known: OrderedDict[str, GrammarConstraint] = OrderedDict()
        self._lock = asyncio.Lock()

    async def compile(self, asked: AskedGrammar) -> GrammarConstraint:
        """Return a fresh constraint.

        Raises:
            ApiError: the grammar is wrong, or too costly to compile.
        """
        source = asked.grammar.source
        async with self._lock:
            constraint = self._known.get(source)
            if constraint is None:
                constraint = await self._compiled(asked)
                self._known[source] = constraint
            self._known.move_to_end(source)
            if len(self._known) > _CACHED_GRAMMARS:
                self._known.popitem(last=False)
        return constraint.fresh()

    async def _compiled(self, asked: AskedGrammar) -> GrammarConstraint:
        work = asyncio.to_thread(self._compiler.compile, asked.grammar)
        try:
            # llguidance bounds its own work; the time bounds how long anybody waits for it.
            return await asyncio.wait_for(work, self._settings.grammar_timeout_s)
        except UnsupportedError as error:
            raise _unsupported(error, asked.param) from error
        except ValueError as error:
            said = str(error).removeprefix("grammar ")
            raise bad_request(f"{asked.param} {said}", asked.param) from error
        except TimeoutError as error:
            limit = self._settings.grammar_timeout_s
            raise bad_request(
                f"{asked.param} must compile within {limit} s", asked.param
            ) from error


def format_grammar(body: ResponseFormat | None, settings: ServerSettings) -> AskedGrammar | None:
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
        return lark_grammar(body.grammar, "response_format.grammar", settings)
    return None


def lark_grammar(text: str, param: str, settings: ServerSettings) -> AskedGrammar:
    """Return a grammar in Lark's form; param names it in errors."""
    _check_length(text, settings.max_grammar_chars, param)
    return _made(Grammar.lark, text, param)


def call_grammar(tools: Sequence[ToolFunction], settings: ServerSettings) -> AskedGrammar:
    """Return the grammar of one call of one of the tools, as a JSON object."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": _rebased(
                    {"type": "object"} | (tool.parameters or {}),
                    f"#/anyOf/{n}/properties/arguments",
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for n, tool in enumerate(tools)
    ]
    return _schema({"anyOf": calls}, "tools", settings)


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


def check_schema(schema: Mapping[str, Any], param: str, settings: ServerSettings) -> None:
    """Raise ApiError if a schema, or a regular expression in it, is too long."""
    _check_length(json.dumps(schema), settings.max_grammar_chars, param)
    for pattern in _patterns(schema):
        _check_length(pattern, settings.max_regex_chars, f"{param}: pattern")


def _schema(schema: Mapping[str, Any], param: str, settings: ServerSettings) -> AskedGrammar:
    check_schema(schema, param, settings)
    return _made(Grammar.json_schema, schema, param)


def _regex(pattern: str, param: str, settings: ServerSettings) -> AskedGrammar:
    _check_length(pattern, settings.max_regex_chars, param)
    return _made(Grammar.regex, pattern, param)


def _made(make: Callable[[Source], Grammar], source: Source, param: str) -> AskedGrammar:
    try:
        return AskedGrammar(make(source), param)
    except UnsupportedError as error:
        raise _unsupported(error, param) from error
    except ValueError as error:
        raise bad_request(f"{param} must be valid: {error}", param) from error


def _unsupported(error: UnsupportedError, param: str) -> ApiError:
    return bad_request(f"{param} must be left out: {error}", param, "unsupported_parameter")


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
