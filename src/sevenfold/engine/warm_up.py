"""What an engine runs before its first request, so that nobody waits for what happens once.

Every row's state, pages and snapshots are the sink's, which nobody is ever given.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sevenfold.config import SevenfoldError
from sevenfold.engine.device.graphs import page_room
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import DraftRow

# Up to so many rows, steps have room for more than the fewest pages of a row: many requests are
# short. Larger tables, and more rows with such, are recorded as they are met.
_ROOMY_ROWS = 8
_UNRECORDED_ROWS = (1, 2, 4, 8)
_DRAFTED_ROWS = (1, 2, 4)
# Prompts that are computed as they come, alone where no prefill is recorded, and in company. Some
# kernels are compiled apart for numbers that 16 divides, and for 1: here are tokens of a run, and
# pages of 64 tokens of its longest prompt, of each kind; and few tokens behind few and many keys.
_ALONE = ((9,), (64,), (500,), (512,), (1000,), (1024,))
_TOGETHER = ((9, 9), (20, 12), (260, 9), (515, 9), (500, 12), (1000, 5), (1000, 24))
# Of these no snapshot is due: a scan that stops nowhere is another kernel, and one of equal rows.
_UNKEPT = ((9, 9), (20, 12), (1000, 24))
_UNIT_TOKENS = 1024  # long chunks meet their keys in powers of two of these


class WarmUpStoppedError(SevenfoldError, RuntimeError):
    """What happens once was given up, because the engine was told to stop."""


class Reach(NamedTuple):
    """What requests there may be.

    most_tokens: of a request. chunk_tokens: of a prompt that are computed at once, at most.
    page_tokens: of a page. has_states: whether the model has linear layers.
    """

    most_tokens: int
    chunk_tokens: int
    page_tokens: int
    has_states: bool

    def row(
        self, num_tokens: int, past: int = 0, *, num_pages: int = 0, keeps: bool = False
    ) -> Row:
        """A row of so many tokens after others.

        Args:
            num_tokens: new ones.
            past: others.
            num_pages: that it has at least.
            keeps: whether a snapshot is due at its end; of one row of a run, as there is one sink.
        """
        end = past + num_tokens
        pages = [SINK] * max(num_pages, -(-end // self.page_tokens))
        kept = {end: SINK} if self.has_states and keeps else {}
        return Row([0] * num_tokens, past, SINK if self.has_states else None, pages, kept)

    def holds(self, num_tokens: int, past: int = 0) -> bool:
        """Whether a request may have such a chunk."""
        return num_tokens <= self.chunk_tokens and past + num_tokens <= self.most_tokens


def first_runs(
    reach: Reach, batch_sizes: Sequence[int], prefill_sizes: Sequence[int]
) -> list[list[Row]]:
    """Return the rows of each run, the largest of each kind first: it makes room for the others.

    Args:
        reach: what requests there may be.
        batch_sizes: rows of decoding steps that are recorded, if any are.
        prefill_sizes: tokens of prefills that are recorded.
    """
    recorded = [[reach.row(n, keeps=True)] for n in reversed(prefill_sizes) if reach.holds(n)]
    steps = [
        [reach.row(1, num_pages=num_pages)] * n
        for n in reversed(batch_sizes or _UNRECORDED_ROWS)
        for num_pages in _rooms(reach, n)
    ]
    kept = (*(() if prefill_sizes else _ALONE), *_TOGETHER)
    prompts = [
        [reach.row(n, keeps=keeps and not place) for place, n in enumerate(lengths)]
        for keeps, of_kind in ((True, kept), (False, _UNKEPT))
        for lengths in of_kind
        if all(map(reach.holds, lengths)) and sum(lengths) <= reach.chunk_tokens
    ]
    above = prefill_sizes[-1] if prefill_sizes else _UNIT_TOKENS
    return recorded + steps + prompts + list(_long_chunks(reach, above))


def first_drafts(reach: Reach, token_sizes: Sequence[int]) -> list[list[DraftRow]]:
    """Return the drafts of each run: chains of as many tokens as token_sizes says."""
    runs = []
    for rows in reversed(_DRAFTED_ROWS):
        for tokens in reversed(token_sizes):
            tree = DraftTree((0,) * (tokens - 1), tuple(range(tokens - 1)))
            # Alone also with more room, as steps have.
            for num_pages in _rooms(reach, 1) if rows == 1 else (1,):
                root = reach.row(1, num_pages=max(num_pages, -(-tokens // reach.page_tokens)))
                runs.append([DraftRow.of(root, tree)] * rows)
    return runs


def _rooms(reach: Reach, rows: int) -> list[int]:
    """Pages that a step's tables have room for, the most first."""
    least = page_room(1)
    if rows > _ROOMY_ROWS or reach.most_tokens <= least * reach.page_tokens:
        return [least]
    return [page_room(least + 1), least]


def _long_chunks(reach: Reach, above: int) -> Iterator[list[Row]]:
    """Chunks that are never recorded: whole ones, and those that meet keys in many blocks."""
    most = reach.chunk_tokens
    if most <= above:
        return
    for tokens, past, keeps in (
        (most, 0, True),
        (most, 0, False),
        (most - _UNIT_TOKENS, 0, True),
        (above + _UNIT_TOKENS // 2 + 1, 0, True),
        (most, most, True),
    ):
        if tokens > above and reach.holds(tokens, past):
            yield [reach.row(tokens, past, keeps=keeps)]
