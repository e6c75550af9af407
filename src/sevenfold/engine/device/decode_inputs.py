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
_PADDING = NextRow(0, SINK, ())


@dataclass(frozen=True)
class Size:
    """Rows of a step, and pages that each row's table has room for."""

    rows: int
    pages: int


class DecodeInputs:
    """Views of one buffer on the device, and the tokens beside it.

    A step leaves here what the next one of the same rows reads (ops.advance_rows): there is
    nothing to send until a row changes, or its pages. These are sent when they are another object
    than the row before had there: whoever changes pages hands over a new one.
    A row that is only there to fill the step is a token without keys, whose state and whose page
    are the sink's: what it computes is finite or not, and nobody reads it.

    chosen: [rows, 2], the id of each row's token; after a step that of the next, and whether the
        logits were finite. ids: [rows, 1], its first column.
    positions: [rows, 1]. slots, page, place, key_lengths: [rows]. pages: [rows, pages].
    places: [4, rows], positions, page, place and key_lengths in one.
    seeds: [rows], of what rounds the rows' states, where they have fewer bits.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self._staging = Staging([(7, size.rows), (size.rows, size.pages)], device)
        columns, self.pages = self._staging.views
        self._sent_ids, self.slots, self.places = columns[0, :, None], columns[1], columns[2:6]
        self.positions = self.places[0, :, None]
        self.page, self.place, self.key_lengths = self.places[1:]
        self.seeds = columns[6]
        self.chosen = torch.zeros(size.rows, 2, dtype=torch.int64, device=device)
        self.ids = self.chosen[:, :1]
        # What the device holds, once the step that was filled last has run; None is padding.
        self._held: list[NextRow | None] = [None] * size.rows

    def fill(self, rows: Sequence[Row], page_tokens: int) -> None:
        """Send the rows to the device, and padding behind them; nothing waits for the copy."""
        next_rows = [NextRow(row.past, row.state, row.pages) for row in rows]
        ids, seeds = [row.tokens[0] for row in rows], [signed(row.seed) for row in rows]
        self._send(self._padded(next_rows), page_tokens, ids, seeds)
        self.ids.copy_(self._sent_ids)

    def fill_ahead(self, rows: Sequence[NextRow | None], tokens: Tensor, page_tokens: int) -> None:
        """As fill, of rows whose tokens [len(rows)] lie on the device; None is padding."""
        padded = self._padded(rows)
        if padded == self._held:
            self._held = _after(padded)
        else:
            self._send(padded, page_tokens)
        if tokens.data_ptr() != self.chosen.data_ptr():
            self.ids[: len(rows), 0].copy_(tokens)

    def _padded(self, rows: Sequence[NextRow | None]) -> list[NextRow | None]:
        return [*rows, *[None] * (self.size.rows - len(rows))]

    def _send(
        self,
        rows: list[NextRow | None],
        page_tokens: int,
        ids: Sequence[int] = (),
        seeds: Sequence[int] = (),
    ) -> None:
        columns, table = self._staging.begin()
        self._show(table, rows)
        held = [row or _PADDING for row in rows]
        past = np.array([row.past for row in held])
        block = np.minimum(past // page_tokens, self.size.pages - 1)
        columns[0, : len(ids)], columns[0, len(ids) :] = ids, 0
        columns[1] = [SINK if row.state is None else row.state for row in held]
        columns[2], columns[3] = past, table[np.arange(len(rows)), block]
        columns[4] = past % page_tokens
        columns[5] = [0 if row is None else row.past + 1 for row in rows]
        columns[6, : len(seeds)], columns[6, len(seeds) :] = seeds, 0
        self._staging.send()
        self._held = _after(rows)

    def _show(self, table: np.ndarray, rows: list[NextRow | None]) -> None:
        """Write the rows' pages into the table, as far as it does not show them yet."""
        for n, (row, old_row) in enumerate(zip(rows, self._held, strict=True)):
            new, old = (_PADDING.pages if r is None else r.pages for r in (row, old_row))
            if new is not old:
                table[n, : len(new)] = new
                table[n, len(new) :] = SINK


def _after(rows: list[NextRow | None]) -> list[NextRow | None]:
    """The rows when a step has run."""
    return [row and row._replace(past=row.past + 1) for row in rows]
