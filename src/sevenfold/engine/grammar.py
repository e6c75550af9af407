"""Forms that an output must have, compiled by llguidance into masks over tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tokenizers import Tokenizer

from sevenfold.config import UnsupportedError, check_type

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Without a bound an unsure model may write white space for ever.
WHITE_SPACE = r"[ \n]{0,20}"
_MOST_TRIED = 64  # tokens of a beginning that has no choice, before an output needs them


@dataclass(frozen=True)
class Grammar:
    """What an output must match; source is in llguidance's own form."""

    source: str

    def __post_init__(self) -> None:
        check_type("source", self.source, str, "a text")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Self:
        """JSON that follows a schema.

        Raises:
            ValueError: it is no JSON schema.
            UnsupportedError: llguidance is not installed.
        """
        return cls(
            _matcher().grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": WHITE_SPACE}
            )
        )

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that a regular expression matches as a whole."""
        return cls(_matcher().grammar_from_regex(pattern))

    @classmethod
    def lark(cls, text: str) -> Self:
        """Text that a grammar in Lark's form derives from its rule `start`."""
        return cls(_matcher().grammar_from_lark(text))


class GrammarConstraint:
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

    def problem(self) -> str | None:
        """What keeps it from knowing what may come next: most often a limit of llguidance's."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def check_begins(self, vocab_size: int) -> None:
        """Try the tokens that must come first and the mask after them, of which nothing stays.

        Raises:
            ValueError: that much is beyond llguidance's limits.
        """
        trial = self.fresh()
        forced = trial._matcher.compute_ff_tokens()[:_MOST_TRIED]
        trial._matcher.try_consume_tokens(forced)
        trial.fill(np.zeros(-(-vocab_size // 32), dtype=np.int32))
        problem = trial.problem()
        if problem is not None:
            raise ValueError(f"grammar must be one whose masks can be computed: {problem}")

    def fresh(self) -> "GrammarConstraint":
        """A copy, for another output of the same grammar."""
        return GrammarConstraint(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None) -> None:
        self._build = (tokenizer, vocab_size, eos_token_id)
        self._tokenizer: LLTokenizer | None = None

    def compile(self, grammar: Grammar) -> GrammarConstraint:
        """Return a constraint at the beginning of its grammar.

        Raises:
            ValueError: the grammar is wrong, or its beginning beyond llguidance's limits.
            UnsupportedError: llguidance is not installed, or cannot use the tokenizer.
        """
        matcher = _matcher()(self._tokens(), grammar.source, log_level=0)
        if matcher.is_error():
            raise ValueError(f"grammar must be valid: {_first_line(matcher.get_error())}")
        constraint = GrammarConstraint(matcher)
        constraint.check_begins(self._build[1])
        return constraint

    def _tokens(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            tokenizer, vocab_size, eos = self._build
            try:
                self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=eos)
            except ValueError as error:
                raise UnsupportedError(
                    f"llguidance cannot use this model's tokenizer: {error}"
                ) from error
        return self._tokenizer


def _first_line(text: str) -> str:
    return text.split("\n")[0][:300]


def _matcher() -> "type[LLMatcher]":
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "a grammar must have llguidance, got none installed; pip install 'sevenfold[serve]' "
            "brings it"
        ) from error
    return LLMatcher
