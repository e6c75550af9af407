"""Tools that are strict: free text, and calls whose arguments follow their schemas."""

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server_helpers import (
    EOS,
    VOCAB_SIZE,
    ScriptedEngine,
    byte_tokenizer,
    chat,
    client_of,
    message,
)

from sevenfold.engine.grammar import GrammarCompiler, GrammarConstraint
from sevenfold.server import GenerationRequest, ServerSettings, TemplateSource, TokenOutput
from sevenfold.server.api_chat import ToolFunction
from sevenfold.server.output_parser import OutputParser
from sevenfold.server.strict_tools import strict_grammar

pytestmark = pytest.mark.anyio
pytest.importorskip("llguidance")
LOOK = {
    "name": "look",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/at"}},
        "required": ["at"],
        "$defs": {"at": {"enum": ["x", "y"]}},
        "additionalProperties": False,
    },
}
FREE = {"name": "say", "parameters": {"type": "object", "properties": {"a": {"const": 1}}}}
TOOLS = [{"type": "function", "function": one} for one in (LOOK, FREE)]
RIGHT, WRONG = (
    '{"name": "look", "arguments": {"at": "x"}}',
    '{"name": "look", "arguments": {"at": "z',
)
ANY = '{"name": "say", "arguments": {"a": [2], "b": null}}'


def constraint(*, thinking: bool = False) -> GrammarConstraint:
    tools = [ToolFunction.model_validate(one) for one in (LOOK, FREE)]
    asked = strict_grammar(tools, ServerSettings(), thinking=thinking)
    return GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, EOS).compile(asked.grammar)


def allowed(constraint: GrammarConstraint) -> np.ndarray:
    mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)
    constraint.fill(mask)
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB_SIZE].astype(bool)


def taken(text: str, constraint: GrammarConstraint) -> str:
    """What the grammar takes of a text, with a line after it where the text may end there."""
    ids = byte_tokenizer().encode(text, add_special_tokens=False).ids
    for n, token in enumerate(ids):
        if not allowed(constraint)[token]:
            return text[:n]
        assert constraint.accept(token)
    return text + "|" * bool(allowed(constraint)[EOS])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call, but <tool_cal and {braces} <think>",
        f"so\n<tool_calls>\n{RIGHT}\n{ANY}\n</tool_calls>\nand on",
        f"<tool_call>{RIGHT}</tool_call>\n<tool_call>\n{RIGHT}\n</tool_call>",
        RIGHT,
        f" {RIGHT} and more",
        '{"nam": "no call"}',
        f"<think>a <tool_call> or {WRONG}</think>\n\n{RIGHT}",
        "<think>not at its end",
    ],
)
def test_what_an_answer_may_be(text: str) -> None:
    assert taken(text, constraint()) == text + "|"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"so\n<tool_calls>\n{WRONG}", "z"),
        (f"<tool_call>{RIGHT}</tool_call><tool_call>{WRONG}", "z"),
        (WRONG, "z"),
        (f"<think></think>{WRONG}", "z"),
        ('<tool_calls>{"name": "other', "other"),
        ('<tool_calls>{"name": "look", "arguments": {}', "}"),
        ("<tool_calls>none", "none"),
    ],
)
def test_where_a_call_is_held_to_its_schema(text: str, kept: str) -> None:
    assert taken(text, constraint()) == text.removesuffix(kept)


def test_a_prompt_that_has_opened_the_reasoning() -> None:
    free = f"{WRONG}\n<tool_call></think>\n"
    assert taken(free + RIGHT, constraint(thinking=True)) == free + RIGHT + "|"
    assert taken(free + WRONG, constraint(thinking=True)) == free + WRONG.removesuffix("z")
    assert taken(WRONG, constraint(thinking=True)) == WRONG + "|"


# A form of calls that the parser reads and the grammar has not.
OTHER = '{"name": "look", "parameters": {"at": "z"}}'
PIECES = [
    *("<think>", "</think>", "<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>"),
    *("\xa0", "\u2003", "\x0b", "\n", " ", "\t", ",", "{", "}", '"', "text"),
    *('{"name"', ": ", '"look"', '"say"', ', "arguments": ', ', "parameters": '),
    *('{"at": "x"}', '{"at": "z"}', OTHER),
    *(RIGHT, WRONG + '"}}', ANY),
]
KINDS = {thinking: constraint(thinking=thinking) for thinking in (False, True)}


def calls_of(pushes: Iterable[str], *, thinking: bool) -> list[tuple[str, str]]:
    parser = OutputParser(thinking=thinking, tools=("look", "say"), forced=False)
    parts = [part for text in pushes for part in parser.push(text)] + parser.finish()
    return [(part.call.name, part.call.arguments) for part in parts if part.call is not None]


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=14), thinking=st.booleans())
@example(pieces=["\xa0", "<think>", "</tool_calls>", "{", "</think>", OTHER], thinking=False)
@example(pieces=[RIGHT, WRONG + '"}}'], thinking=False)
def test_what_the_grammar_lets_through_is_read_as_right_calls(pieces, thinking) -> None:
    """The parser sees no call where the grammar sees text, however the text arrives."""
    ruled, said = KINDS[thinking].fresh(), ""
    for piece in pieces:
        kept = taken(piece, ruled).removesuffix("|")
        said += kept
        if kept != piece:
            break
    calls = calls_of([said], thinking=thinking)
    assert calls_of(said, thinking=thinking) == calls
    assert all(json.loads(told)["at"] in ("x", "y") for name, told in calls if name == "look")


@dataclass
class ObedientEngine(ScriptedEngine):
    """Says its text as far as the constraint lets it, and then the first token that it may."""

    max_context_tokens: int = 2000
    features: frozenset = frozenset({"constraint"})

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        self.asked.append(request)
        ids, ruled = (
            self.tokenizer.encode(self.text, add_special_tokens=False).ids,
            request.constraint,
        )
        for n in range(request.sampling.max_tokens):
            token = ids[n] if n < len(ids) else EOS
            if ruled is not None:
                may = allowed(ruled)
                token = token if may[token] else int(np.flatnonzero(may)[-1])
            if token == EOS or (ruled is not None and not ruled.accept(token)):
                yield TokenOutput(token, "", "stop", prompt=None if n else self.prompt)
                return
            text = self.tokenizer.decode([token])
            reason = "length" if n == request.sampling.max_tokens - 1 else None
            yield TokenOutput(token, text, reason, prompt=None if n else self.prompt)


async def test_strict_arguments_follow_their_schema() -> None:
    said = f'so\n<tool_calls>\n{WRONG}"}}}}\n</tool_calls>'
    for strict, at in ((True, ("x", "y")), (False, ("z",))):
        tools = [{"type": "function", "function": LOOK | {"strict": strict}}]
        async with client_of(ObedientEngine(said)) as client:
            for fields in ({}, {"tool_choice": "auto"}):
                response = await chat(client, tools=tools, max_tokens=200, **fields)
                [choice] = response.json()["choices"]
                [call] = choice["message"]["tool_calls"]
                assert json.loads(call["function"]["arguments"])["at"] in at
                assert choice["message"]["content"] == "so"


async def test_a_template_that_opens_the_reasoning() -> None:
    template = TemplateSource("{{ tools }}{{ messages[0].content }}<think>\n", stop=())
    async with client_of(ObedientEngine(f"hm {WRONG}</think>{WRONG}"), template=template) as client:
        [choice] = (await chat(client, tools=TOOLS, max_tokens=200)).json()["choices"]
    assert choice["message"]["reasoning_content"] == f"hm {WRONG}"
    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["at"] in ("x", "y")


async def test_what_strict_cannot_stand_beside() -> None:
    form = {"type": "json_object"}
    async with client_of(ScriptedEngine()) as client:
        said = message(await chat(client, tools=TOOLS))
        assert said.startswith("tools must be left out: the engine that serves this model")
        assert (await chat(client, tools=TOOLS, tool_choice="none")).status_code == 200
    async with client_of(ObedientEngine()) as client:
        response = await chat(client, tools=TOOLS, response_format=form)
        assert response.status_code == 400
        assert "strict must be left out, or false, beside a response_format" in message(response)
        broken = {"type": "function", "function": LOOK | {"parameters": {"type": "banana"}}}
        response = await chat(client, tools=[broken])
        assert response.status_code == 400
        assert message(response).startswith("tools must be valid")


def choosing(mode: str, *names: str) -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


async def test_some_of_the_tools_are_allowed() -> None:
    engine = ObedientEngine(f"<tool_call>{ANY}</tool_call>")
    async with client_of(engine) as client:
        free = [TOOLS[1], {"type": "function", "function": LOOK | {"strict": False}}]
        for names, called in ((("say",), True), (("look",), False)):
            response = await chat(client, tools=free, tool_choice=choosing("auto", *names))
            [choice] = response.json()["choices"]
            assert bool(choice["message"]["tool_calls"]) is called
        response = await chat(client, tools=free, tool_choice=choosing("required", "look"))
        [call] = response.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "look"
        prompts = {one.prompt for one in engine.asked}
        assert len(prompts) == 1  # which shows them all
        response = await chat(client, tools=free, tool_choice=choosing("auto", "go"))
        assert message(response) == "tool_choice must name one of tools, got 'go'"
