"""What a decoding step reads of each row, in buffers that stay where they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sevenfold.engine.device.staging import Staging
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row


@dataclass(frozen=True)
class Size:
    """Rows of a step, and pages that each row's table has room for."""

    rows: int
    pages: int


class DecodeInputs:
    """Named views of one buffer on the device.

    A row that is only there to fill the step is a token of id 0 without keys, whose state and
    whose page are the sink's: what it computes is finite or not, and nobody reads it.

    ids, positions: [rows, 1]. slots, page, place, key_lengths: [rows]. pages: [rows, pages].
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self._staging = Staging([(6, size.rows), (size.rows, size.pages)], device)
        columns, self.pages = self._staging.views
        self.ids, self.positions = columns[0, :, None], columns[1, :, None]
        self.slots, self.page, self.place, self.key_lengths = columns[2:]

    def fill(self, rows: Sequence[Row], page_tokens: int) -> None:
        """Send the rows to the device, and padding behind them; nothing waits for the copy."""
        columns, table = self._staging.begin()
        N = len(rows)
        columns[:, N:], table[N:] = _padding()[:, None], SINK
        past = np.array([row.past for row in rows])
        columns[0, :N] = [row.tokens[0] for row in rows]
        columns[1, :N], columns[5, :N] = past, past + 1
        columns[2, :N] = [SINK if row.state is None else row.state for row in rows]
        for n, row in enumerate(rows):
            table[n, : len(row.pages)] = row.pages
            table[n, len(row.pages) :] = SINK
        block = np.minimum(past // page_tokens, self.size.pages - 1)
        columns[3, :N], columns[4, :N] = table[np.arange(N), block], past % page_tokens
        self._staging.send()


def _padding() -> np.ndarray:
    """id, position, slot, page, place and number of keys of a row that fills the step."""
    return np.array([0, 0, SINK, SINK, 0, 0])
