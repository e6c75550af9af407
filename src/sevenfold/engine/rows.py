"""What a run of the model is asked for: new tokens of requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from sevenfold.engine.sampling import Logprobs


@dataclass(frozen=True)
class Scored:
    """Tokens whose log probabilities a row shall give, beside what it computes.

    targets: the token after each of the row's tokens, as far as it is known.
    num_top: how many of the most probable tokens to give beside each.
    found: where they go.
    """

    targets: Sequence[int]
    num_top: int
    found: list[Logprobs]


class NextRow(NamedTuple):
    """A request's next token, whose id is on the device alone; fields as Row's."""

    past: int
    state: int | None
    pages: Sequence[int]


class Row(NamedTuple):
    """New tokens of one request.

    tokens: their ids, at least one.
    past: tokens that its state and its pages have seen.
    state: its index among the states; None in a model without linear layers.
    pages: its pages, in the order of its tokens, with room for the new ones.
    snapshots: token count in (past, past + new tokens] -> snapshot to write the state into.
    seed: of the stochastic rounding of its state, where there is any.
    scored: what else to read of its tokens.
    """

    tokens: Sequence[int]
    past: int
    state: int | None
    pages: Sequence[int]
    snapshots: dict[int, int]
    seed: int = 0
    scored: Scored | None = None

    @property
    def end(self) -> int:
        """Tokens that will have been seen."""
        return self.past + len(self.tokens)

    def parts(self, chunk_tokens: int | None = None) -> "list[Row]":
        """The row cut where a snapshot is due, and at multiples of chunk_tokens if they are given;
        of snapshots each part has the one at its end alone."""
        inner = {at for at in self.snapshots if at < self.end}
        if chunk_tokens is not None:
            first = self.past // chunk_tokens * chunk_tokens + chunk_tokens
            inner.update(range(first, self.end, chunk_tokens))
        cuts = [self.past, *sorted(inner), self.end]
        return [
            Row(
                tokens=self.tokens[first - self.past : last - self.past],
                past=first,
                state=self.state,
                pages=self.pages,
                snapshots={last: self.snapshots[last]} if last in self.snapshots else {},
                seed=self.seed,
                scored=self._scored(first - self.past, last - self.past),
            )
            for first, last in pairwise(cuts)
        ]

    def _scored(self, first: int, last: int) -> Scored | None:
        if self.scored is None:
            return None
        return replace(self.scored, targets=self.scored.targets[first:last])
