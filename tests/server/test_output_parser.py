"""Reasoning, content and tool calls told apart, however the text is cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.server.output_parser import OutputParser, Part
from sevenfold.server.tool_calls import take_call

CALL = '{"name": "look", "arguments": {"at": "a } b", "n": [1, 2]}}'
OTHER = '{"name": "go", "arguments": {}}'
ARGUMENTS = {"at": "a } b", "n": [1, 2]}
TOOLS = ("look", "go")


def told_apart(pieces: list[str], **how: object) -> tuple[str, str, list[tuple[str, object]]]:
    """Reasoning, content, and names with arguments of calls."""
    parser = OutputParser(**({"thinking": False, "tools": TOOLS, "forced": False} | how))
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.finish()
    texts = ["".join(p.text for p in parts if p.kind == kind) for kind in ("reasoning", "content")]
    calls = [(p.call.name, json.loads(p.call.arguments)) for p in parts if p.call is not None]
    return texts[0], texts[1], calls


CASES = [
    ("plain text", {}, ("", "plain text", [])),
    ("", {}, ("", "", [])),
    ("\n indented <b>", {}, ("", "\n indented <b>", [])),
    ("<think>\nwhy\n</think>\n\nso", {}, ("why", "so", [])),
    ("why</think>so", {"thinking": True}, ("why", "so", [])),
    ("<think>never ends", {}, ("never ends", "", [])),
    ("<thinking> is no tag", {}, ("", "<thinking> is no tag", [])),
    ("a <think>b</think>", {}, ("", "a <think>b</think>", [])),
    (f"<tool_calls>\n{CALL}\n</tool_calls>", {}, ("", "", [("look", ARGUMENTS)])),
    (
        f"well\n<tool_calls>\n{CALL}\n{OTHER}\n</tool_calls>\n",
        {},
        ("", "well", [("look", ARGUMENTS), ("go", {})]),
    ),
    (
        f"<think>hm</think><tool_call>{CALL}</tool_call><tool_call>{OTHER}</tool_call>",
        {},
        ("hm", "", [("look", ARGUMENTS), ("go", {})]),
    ),
    (f"<tool_calls>{CALL}", {}, ("", "", [("look", ARGUMENTS)])),
    (f"  {CALL}\n", {}, ("", "", [("look", ARGUMENTS)])),
    (
        '{"name": "look", "parameters": {"a": 1}}',
        {},
        ("", "", [("look", {"a": 1})]),
    ),
    (
        '<tool_call>{"name": "go", "arguments": "{\\"a\\": 1}"}</tool_call>',
        {},
        ("", "", [("go", {"a": 1})]),
    ),
    (CALL, {"forced": True}, ("", "", [("look", ARGUMENTS)])),
    (CALL, {"tools": ()}, ("", CALL, [])),
    ("<tool_calls>[]</tool_calls>", {"tools": ()}, ("", "<tool_calls>[]</tool_calls>", [])),
    ('{"answer": 4}', {}, ("", '{"answer": 4}', [])),
    ('{"name": "nobody", "arguments": {}}', {}, ("", '{"name": "nobody", "arguments": {}}', [])),
    ('{"name": "look", "arg', {}, ("", '{"name": "look", "arg', [])),
    ("<tool_call>{broken}</tool_call>", {}, ("", "<tool_call>{broken}</tool_call>", [])),
    ("<tool_call>{broken", {}, ("", "<tool_call>{broken", [])),
    ("1 < 2 <tool", {}, ("", "1 < 2 <tool", [])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "how", "expected"), CASES)
def test_told_apart_at_once_and_by_characters(text: str, how: dict, expected: tuple) -> None:
    assert told_apart([text], **how) == expected
    assert told_apart(list(text), **how) == expected


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_where_the_text_is_cut_makes_no_difference(data: st.DataObject) -> None:
    text, how, expected = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert told_apart(pieces, **how) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<tool_calls>", "</tool_call>", CALL, '{"name"', "}", "\n", "x"]
        ),
        max_size=8,
    )
)
def test_without_tools_no_text_is_lost_but_tags_and_line_breaks(pieces: list[str]) -> None:
    reasoning, content, calls = told_apart(pieces, tools=())
    assert calls == []

    text = "".join(pieces)
    if text.lstrip().startswith("<think>"):
        text = text.replace("<think>", "", 1).replace("</think>", "", 1)
    assert (reasoning + content).replace("\n", "") == text.replace("\n", "")


def test_text_is_given_as_soon_as_it_can_be_no_tag() -> None:
    parser = OutputParser(thinking=False, tools=TOOLS, forced=False)
    given = ["".join(part.text for part in parser.push(piece)) for piece in ("a", "b <", "to", "p")]
    assert given == ["a", "b ", "", "<top"]


def test_nesting_beyond_reason_is_no_call() -> None:
    deep = '{"name": "look", "arguments": ' + "[" * 100_000
    assert take_call(deep) == (None, deep)
