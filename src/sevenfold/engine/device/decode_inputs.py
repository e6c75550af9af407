"""What a decoding step reads of each row, in buffers that stay where they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.device.staging import Staging
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import NextRow, Row
from sevenfold.engine.runner import signed

# Where padding's columns come from: all of them are 0, the sink's number among them.
_NO_PAGES: tuple[int, ...] = ()
_PADDING = NextRow(0, SINK, _NO_PAGES)


@dataclass(frozen=True)
class Size:
    """Rows of a step, and pages that each row's table has room for."""

    rows: int
    pages: int


class DecodeInputs:
    """Named views of one buffer on the device.

    A row that is only there to fill the step is a token of id 0 without keys, whose state and
    whose page are the sink's: what it computes is finite or not, and nobody reads it.
    A row's pages are written when they are another object than the row before had there: whoever
    changes pages hands over a new one.

    ids, positions: [rows, 1]. slots, page, place, key_lengths: [rows]. pages: [rows, pages].
    seeds: [rows], of what rounds the rows' states, where they have fewer bits.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self._staging = Staging([(7, size.rows), (size.rows, size.pages)], device)
        columns, self.pages = self._staging.views
        self.ids, self.positions = columns[0, :, None], columns[1, :, None]
        self.slots, self.page, self.place, self.key_lengths, self.seeds = columns[2:]
        # What each row of the table on the host shows.
        self._shown: list[Sequence[int]] = [_NO_PAGES] * size.rows

    def fill(self, rows: Sequence[Row], page_tokens: int) -> None:
        """Send the rows to the device, and padding behind them; nothing waits for the copy."""
        ids = [row.tokens[0] for row in rows]
        self._send(rows, ids, [signed(row.seed) for row in rows], page_tokens)

    def fill_ahead(self, rows: Sequence[NextRow | None], tokens: Tensor, page_tokens: int) -> None:
        """As fill, of rows whose tokens [len(rows)] lie on the device; None is padding."""
        self._send(rows, [0] * len(rows), [0] * len(rows), page_tokens)
        self.ids[: len(rows), 0].copy_(tokens)

    def _send(
        self,
        rows: Sequence[Row | NextRow | None],
        ids: list[int],
        seeds: list[int],
        page_tokens: int,
    ) -> None:
        columns, table = self._staging.begin()
        N = len(rows)
        held = [row or _PADDING for row in rows]
        past = np.array([row.past for row in held])
        columns[:, N:] = 0
        columns[0, :N], columns[1, :N] = ids, past
        columns[2, :N] = [SINK if row.state is None else row.state for row in held]
        self._show(table, [row.pages for row in held])
        block = np.minimum(past // page_tokens, self.size.pages - 1)
        columns[3, :N], columns[4, :N] = table[np.arange(N), block], past % page_tokens
        columns[5, :N] = [0 if row is None else row.past + 1 for row in rows]
        columns[6, :N] = seeds
        self._staging.send()

    def _show(self, table: np.ndarray, pages: list[Sequence[int]]) -> None:
        """Write the rows' pages into the table, as far as it does not show them yet."""
        pages += [_NO_PAGES] * (self.size.rows - len(pages))
        for n, (new, old) in enumerate(zip(pages, self._shown, strict=True)):
            if new is not old:
                table[n, : len(new)] = new
                table[n, len(new) :] = SINK
        self._shown = pages
