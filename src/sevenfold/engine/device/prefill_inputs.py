"""What the prefill of one request reads, in buffers that stay where they are."""

from collections.abc import Sequence

import numpy as np
import torch

from sevenfold.engine.device.staging import Staging
from sevenfold.engine.item_words import NOTHING
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row
from sevenfold.ops import PaddedCuts, Stop
from sevenfold.ops.lightning.segments import Plan

_PADDING = np.array([[0], [SINK], [0]])  # position, page, place


class PrefillInputs:
    """Named views of one buffer on the device.

    Tokens behind the row's are padding: its ids over again, in place 0 of the sink's first page.
    They belong to no sequence: attention passes over them, states do not see them, and nobody reads
    what they computed, finite or not. One id for all would send them all to the same experts, whose
    weights are read again for each tile of rows.

    ids, positions: [1, tokens]. page, place: [tokens]. slots, key_lengths, last: [1], the request's
    state, its keys and the row's last token. borders: [2], where the row's tokens begin and end.
    places: [1 + MOST_CLEARED], what is copied and cleared before. pages: [1, pages].
    chosen: [1, 2], written: the most probable token's id, and whether the logits are finite.
    nowhere: [4, 1], the places of no row.
    """

    def __init__(
        self, cuts: PaddedCuts, pages: int, page_tokens: int, device: torch.device
    ) -> None:
        """Allocate them for the tokens of the cuts, and so many pages of the request."""
        self.tokens, self._cuts = cuts.num_tokens, cuts
        shapes = [(4, self.tokens), (5 + len(NOTHING),), (1, pages), (cuts.num_numbers,)]
        self._staging = Staging(shapes, device)
        columns, which, self.pages, self._numbers = self._staging.views
        self.ids, self.positions = columns[0, None], columns[1, None]
        self.page, self.place = columns[2], columns[3]
        self.slots, self.key_lengths, self.last, self.borders, self.places = which.split(
            [1, 1, 1, 2, len(NOTHING)]
        )
        self.chosen, self.nowhere = (
            torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1, 2), (4, 1))
        )
        self._written = Written(*self._staging.begin())
        self._num_pages, self._page_tokens = pages, page_tokens
        self._place_from = np.arange(self.tokens + page_tokens) % page_tokens

    def fill(self, row: Row, places: Sequence[int]) -> None:
        """Write a row, and padding behind it, for `send` to copy.

        It waits for the run that was given the last one: of a prompt's chunks, for the one before
        if it has the same size.

        places: as ItemWords.places gives them.
        """
        self._staging.begin()
        to, L, past, page_tokens = self._written, len(row.tokens), row.past, self._page_tokens
        end, first, offset = past + L, past // page_tokens, past % page_tokens
        num_pages = -(-end // page_tokens)
        self._show(row.pages[:num_pages])
        # Copies alone: arithmetic on arrays takes several times as long, the first time at least.
        to.ids[:L], to.positions[:L] = row.tokens, np.arange(past, end)
        to.page[:L] = to.pages[first:num_pages].repeat(page_tokens)[offset : offset + L]
        to.place[:L] = self._place_from[offset : offset + L]
        if self.tokens > L:
            to.columns[1:, L:] = _PADDING
            _repeat(to.ids, L)
        to.which[:] = SINK if row.state is None else row.state, end, L - 1, 0, L, *places
        stops = [Stop(0, seen - row.past, slot) for seen, slot in row.snapshots.items()]
        self._cuts.write(to.numbers, L, stops)

    def send(self) -> None:
        """Copy what is written to the device: a part of the recording, and no call of its own."""
        self._staging.copy()

    def note_launched(self) -> None:
        """Note that a run reads what is written, until it has come to its end."""
        self._staging.note_copied()

    def _show(self, pages: Sequence[int]) -> None:
        """Write a row's pages into the table, and the sink's as far as it shows others' there."""
        table, num_pages = self._written.pages, len(pages)
        table[:num_pages] = pages
        if num_pages < self._num_pages:
            table[num_pages : self._num_pages] = SINK
        self._num_pages = num_pages

    def plan(self) -> Plan:
        """What scans read of the row; a copy on the device, in the order of its stream."""
        return self._cuts.plan(self._numbers.int())


class Written:
    """The arrays on the host by name, cut once: each cut takes as long as to write what is in it.

    As those on the device, but for pages, which are one row.
    """

    def __init__(
        self, columns: np.ndarray, which: np.ndarray, pages: np.ndarray, numbers: np.ndarray
    ) -> None:
        self.columns, self.which, self.pages, self.numbers = columns, which, pages[0], numbers
        self.ids, self.positions, self.page, self.place = columns


def _repeat(ids: np.ndarray, num: int) -> None:
    """Fill the ids with the first of them, over again."""
    while num < len(ids):
        more = min(num, len(ids) - num)
        ids[num : num + more] = ids[:more]
        num += more
