"""What the prefill of one request reads, in buffers that stay where they are."""

import numpy as np
import torch

from sevenfold.engine.device.staging import Staging
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row
from sevenfold.ops import PaddedCuts, Stop
from sevenfold.ops.lightning.segments import Plan


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

    def fill(self, row: Row, page_tokens: int) -> None:
        """Send a row to the device, and padding behind it; nothing waits for the copy."""
        columns, which, pages, numbers = self._staging.begin()
        L = len(row.tokens)
        columns[1, L:], columns[2, L:], columns[3, L:] = 0, SINK, 0
        own = row.pages[: -(-row.end // page_tokens)]
        pages[0, : len(own)], pages[0, len(own) :] = own, SINK
        at = np.arange(row.past, row.end)
        columns[0, :L], columns[1, :L] = row.tokens, at
        columns[0, L:] = np.resize(columns[0, :L], self.tokens - L)
        columns[2, :L] = pages[0, np.minimum(at // page_tokens, pages.shape[1] - 1)]
        columns[3, :L] = at % page_tokens
        which[:] = SINK if row.state is None else row.state, row.end, L - 1, 0, L
        stops = [Stop(0, seen - row.past, slot) for seen, slot in row.snapshots.items()]
        self._cuts.write(numbers, L, stops)
        self._staging.send()

    def plan(self) -> Plan:
        """What scans read of the row; a copy on the device, in the order of its stream."""
        return self._cuts.plan(self._numbers.int())
