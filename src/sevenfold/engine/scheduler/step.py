"""What the model is to compute next."""

from typing import NamedTuple

from sevenfold.engine.request import Request


class PrefillChunk(NamedTuple):
    """Tokens [first, end) of a request.

    snapshots: token counts in (first, end], rising, after which to store the state.
    yields_token: whether the request's next token is to be chosen after this chunk, its last.
    """

    request: Request
    first: int
    end: int
    snapshots: tuple[int, ...]
    yields_token: bool


class DecodeRow(NamedTuple):
    """The last token of a request, with up to draft_tokens guesses of those that follow.

    snapshots: token counts, rising, after which to store the state if the step comes to them.
    """

    request: Request
    draft_tokens: int
    snapshots: tuple[int, ...]


class Step(NamedTuple):
    """One step's work, prefill and decoding apart, and what became of other requests.

    prefills: in the order of rank.
    decodes: in the order of rank.
    preempted: requests that lost their memory and wait again.
    ended: requests that ended since the step before; each knows its finish_reason.
    """

    prefills: tuple[PrefillChunk, ...]
    decodes: tuple[DecodeRow, ...]
    preempted: tuple[Request, ...]
    ended: tuple[Request, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes at most."""
        chunks = sum(chunk.end - chunk.first for chunk in self.prefills)
        return chunks + sum(1 + row.draft_tokens for row in self.decodes)
