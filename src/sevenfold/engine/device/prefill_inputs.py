"""What the prefill of one request reads, in buffers that stay where they are."""

from collections.abc import Sequence

import numpy as np
import torch

from sevenfold.engine.device.staging import Staging
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
    pages: [1, pages].
    """

    def __init__(self, cuts: PaddedCuts, pages: int, device: torch.device) -> None:
        """Allocate them for the tokens of the cuts, and so many pages of the request."""
        self.tokens, self._cuts = cuts.num_tokens, cuts
        shapes = [(4, self.tokens), (5,), (1, pages), (cuts.num_numbers,)]
        self._staging = Staging(shapes, device)
        columns, which, self.pages, self._numbers = self._staging.views
        self.ids, self.positions = columns[0, None], columns[1, None]
        self.page, self.place = columns[2], columns[3]
        self.slots, self.key_lengths, self.last, self.borders = which.split([1, 1, 1, 2])
        self._written = Written(*self._staging.begin())
        self._offsets, self._num_pages = np.arange(self.tokens), pages

    def fill(self, row: Row, page_tokens: int) -> None:
        """Send a row to the device, and padding behind it; nothing waits for the copy."""
        self._staging.begin()
        to, L, end = self._written, len(row.tokens), row.end
        self._show(row.pages, -(-end // page_tokens))
        np.add(self._offsets, row.past, out=to.positions)
        np.divmod(to.positions, page_tokens, out=(to.page, to.place))
        to.page[:] = to.pages.take(to.page, mode="clip")
        to.ids[:L] = row.tokens
        if L < self.tokens:
            to.columns[1:, L:] = _PADDING
            _repeat(to.ids, L)
        to.which[:] = SINK if row.state is None else row.state, end, L - 1, 0, L
        stops = [Stop(0, seen - row.past, slot) for seen, slot in row.snapshots.items()]
        self._cuts.write(to.numbers, L, stops)
        self._staging.send()

    def _show(self, pages: Sequence[int], num_pages: int) -> None:
        """Write a row's pages into the table, and the sink's as far as it shows others' there."""
        table = self._written.pages
        table[:num_pages] = pages[:num_pages]
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
