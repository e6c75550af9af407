"""A request under way, as the engine sees it."""

from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from sevenfold.engine.cache import Lookup
from sevenfold.engine.constraint import Constraint
from sevenfold.engine.request import Request
from sevenfold.engine.rows import Row, Scored
from sevenfold.engine.sampling import Logprobs, Output
from sevenfold.engine.text import TextStream

NO_TOKEN = "no token can follow in the output's grammar"


@dataclass
class Underway:
    """A request with its sampler's view of it, its text and its grammar."""

    request: Request
    output: Output
    tokenizer: Tokenizer
    constraint: Constraint | None
    prompt: Lookup | None = None
    scored: list[Logprobs] | None = None

    @cached_property
    def text(self) -> TextStream:
        """Its output's text so far."""
        return TextStream(self.tokenizer, self.output.params.stop)

    def begin_text(self) -> None:
        """Make its text, if that has not been done: the first token is waited for, and this not."""
        _ = self.text

    @property
    def chooses_blind(self) -> bool:
        """Whether its next token can be chosen while the host does not know the last one.

        A grammar, words to avoid, an end that comes too early and log probabilities are looked
        after on the host.
        """
        output, params = self.output, self.output.params
        is_free = self.constraint is None and params.logprobs is None and not output.bad_words
        return is_free and len(output.tokens) >= params.min_tokens

    def scoring(self, row: Row) -> Row:
        """The row of a prompt's chunk, with the log probabilities that are asked of it."""
        num_top, request = self.output.params.prompt_logprobs, self.request
        if num_top is None or request.generated:
            return row
        if row.past == 0 or self.scored is None:
            self.scored = []  # anew, if the request was preempted
        targets = request.prompt[row.past + 1 : row.end + 1]
        return row._replace(scored=Scored(targets, num_top, self.scored))

    def take_scored(self) -> tuple[Logprobs, ...] | None:
        """The prompt's log probabilities, once its last chunk is computed."""
        if self.scored is None:
            return None
        self.request.max_cached_tokens = None
        return tuple(self.scored)

    def accepts(self, token: int) -> bool:
        """Advance the grammar, but for a token that ends the output; False if it may not follow."""
        if self.constraint is None:
            return True
        if token in self.output.end_ids:
            # A grammar that has failed allows the end alone, whatever is missing before it.
            return self.constraint.problem() is None
        return self.constraint.accept(token)

    @property
    def refusal(self) -> str:
        """Why its grammar does not accept what was chosen."""
        problem = None if self.constraint is None else self.constraint.problem()
        return NO_TOKEN if problem is None else f"the output's grammar has failed: {problem}"

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token: the text that may be shown now, and whether the output ends here."""
        if token in self.output.end_ids:
            return "", True
        shown = self.text.push(token)
        ended = self.constraint is not None and self.constraint.finished()
        return shown, self.text.stopped or ended
