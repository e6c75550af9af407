"""An answer's text as it comes, told apart: reasoning, content, tool calls."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from sevenfold.server.tool_calls import CLOSING, SPACE, ParsedCall, may_be_bare_call, take_call

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Part:
    """A piece of an answer; call is set for a tool call, text for the others."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call: ParsedCall | None = None


class _State(Enum):
    START = auto()
    THINKING = auto()
    ANSWER = auto()  # nothing of the answer has been shown
    CONTENT = auto()
    CALLS = auto()
    BARE_CALL = auto()


class OutputParser:
    """Splits one answer; text that may yet become a tag is held back.

    What looks like a tool call and is none, broken JSON or the name of no tool, comes out as
    content: nothing is lost.
    """

    def __init__(self, *, thinking: bool, tools: Collection[str], forced: bool) -> None:
        """Begin.

        Args:
            thinking: the prompt has opened the reasoning already.
            tools: names that may be called; empty reads no calls.
            forced: a grammar makes the answer one bare call.
        """
        self._state = _State.THINKING if thinking else _State.START
        self._tools, self._forced = frozenset(tools), forced
        self._text = ""
        self._closing = ""
        self._opening = ""
        self._skips_breaks = thinking
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """Take more text, and return what can be told of it."""
        self._text += text
        before = None
        while before != (self._state, len(self._text)):
            before = (self._state, len(self._text))
            self._advance("}" in text)
        return self._taken()

    def finish(self) -> list[Part]:
        """Return what was held back, at the end of the output."""
        if self._state in (_State.CALLS, _State.BARE_CALL, _State.ANSWER):
            self._read_calls()
        rest, self._text = self._text, ""
        if self._state is _State.CALLS:
            kept = "" if not rest.strip(SPACE) else self._opening + rest
            self._emit("content", kept)
        else:
            thinking = self._state is _State.THINKING
            self._emit("reasoning" if thinking else "content", rest)
        return self._taken()

    def _advance(self, maybe_complete: bool) -> None:
        if self._skips_breaks:  # those next to a tag belong to no part
            self._text = self._text.lstrip("\n")
            self._skips_breaks = not self._text
        match self._state:
            case _State.START:
                self._start()
            case _State.THINKING:
                if self._until(CLOSE, "reasoning"):
                    self._state = _State.ANSWER
            case _State.ANSWER:
                self._answer()
            case _State.CONTENT:
                self._content()
            case _State.CALLS | _State.BARE_CALL:
                self._calls(maybe_complete)

    def _start(self) -> None:
        begun = self._text.lstrip(SPACE)
        if begun.startswith(OPEN):
            self._text, self._skips_breaks = begun[len(OPEN) :], True
            self._state = _State.THINKING
        elif not OPEN.startswith(begun):
            self._state = _State.ANSWER

    def _answer(self) -> None:
        if self._forced:
            self._state = _State.BARE_CALL
        elif self._tools and may_be_bare_call(self._text):
            if "}" in self._text:
                self._state = _State.BARE_CALL
        elif self._text:
            self._state = _State.CONTENT

    def _content(self) -> None:
        if not self._tools:
            self._emit_all("content")
            return
        found = [(at, tag) for tag in CLOSING if (at := self._text.find(tag)) >= 0]
        if not found:
            self._emit_safe("content", CLOSING)
            return
        at, tag = min(found)
        self._emit("content", self._text[:at].rstrip("\n"))
        self._text = self._text[at + len(tag) :]
        self._opening, self._closing = tag, CLOSING[tag]
        self._state = _State.CALLS

    def _calls(self, maybe_complete: bool) -> None:
        if maybe_complete:
            self._read_calls()
        if self._state is not _State.CALLS:
            return
        body, tag, after = self._text.partition(self._closing)
        if tag:
            kept = self._opening + body + tag if body.strip(SPACE + ",") else ""
            self._emit("content", kept)
            self._text, self._skips_breaks = after, True
            self._state = _State.CONTENT

    def _read_calls(self) -> None:
        while True:
            call, rest = take_call(self._text)
            if call is None:
                return
            if call.name not in self._tools:
                if self._state is not _State.CALLS:
                    self._state = _State.CONTENT
                return
            self._parts.append(Part("tool_call", call=call))
            self._text = rest
            if self._state is not _State.CALLS:
                self._state, self._skips_breaks = _State.CONTENT, True
                return

    def _until(self, tag: str, kind: Literal["reasoning", "content"]) -> bool:
        """Give text up to a tag; True if the tag was there, which is then dropped."""
        before, found, after = self._text.partition(tag)
        if not found:
            self._emit_safe(kind, (tag,))
            return False
        self._emit(kind, before.rstrip("\n"))
        self._text, self._skips_breaks = after, True
        return True

    def _emit_safe(self, kind: Literal["reasoning", "content"], tags: Collection[str]) -> None:
        """Give all but an end that a tag, or the line breaks before one, may begin in."""
        held = 0
        for tag in tags:
            for length in range(1, len(tag)):
                if self._text.endswith(tag[:length]):
                    held = max(held, length)
        safe = self._text[: len(self._text) - held].rstrip("\n")
        self._emit(kind, safe)
        self._text = self._text[len(safe) :]

    def _emit_all(self, kind: Literal["reasoning", "content"]) -> None:
        self._emit(kind, self._text)
        self._text = ""

    def _emit(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            self._parts.append(Part(kind, text))

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts
