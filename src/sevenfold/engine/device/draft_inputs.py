"""What the verification of drafts reads of each row, in buffers that stay where they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.device.staging import Staging
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.ops import MAX_DRAFT_TOKENS

SKIPPED = -1  # the slot of a row that only fills the step


@dataclass(frozen=True)
class DraftSize:
    """Rows of a step, tokens of each row's draft with its root, and pages of a row's table."""

    rows: int
    tokens: int
    pages: int


@dataclass(frozen=True)
class Draft:
    """A row whose tokens are a tree, and which tokens of its state's last draft count."""

    row: Row
    tree: DraftTree
    accepted: Sequence[int]


class DraftInputs:
    """Named views of one buffer on the device.

    A draft that is shorter than the step is filled up with copies of its root, which see themselves
    alone: their keys go to the sink, and where theirs would be read lies what the request itself
    left. A row that is only there to fill the step has no keys and no slot. So nobody reads what a
    padding token computed.

    ids, positions: [rows, tokens]. page, place: [rows * tokens]. slots, key_lengths: [rows].
    pages: [rows, pages]. sees: [rows, tokens], bit s says that the token sees token s of its draft.
    accepted: [rows, MAX_DRAFT_TOKENS], filled up with -1.
    """

    def __init__(self, size: DraftSize, device: torch.device) -> None:
        self.size = size
        rows, tokens = size.rows, size.tokens
        shapes = [(5, rows, tokens), (2, rows), (rows, MAX_DRAFT_TOKENS), (rows, size.pages)]
        self._staging = Staging(shapes, device)
        columns, lengths, self.accepted, self.pages = self._staging.views
        self.ids, self.positions, self.sees = columns[0], columns[1], columns[4]
        self.page, self.place = columns[2].flatten(), columns[3].flatten()
        self.slots, self.key_lengths = lengths
        # What is recorded before any draft is there reads no state: its count may be anything.
        self.slots.fill_(SKIPPED)

    def fill(self, drafts: Sequence[Draft], page_tokens: int) -> None:
        """Send the drafts to the device, and padding behind them; nothing waits for the copy."""
        columns, lengths, accepted, table = self._staging.begin()
        N, nodes = len(drafts), np.arange(self.size.tokens)
        columns[:4, N:], columns[2, N:] = 0, SINK
        columns[4, N:] = 1 << nodes
        lengths[0, N:], lengths[1, N:], table[N:] = SKIPPED, 0, SINK
        accepted[:] = -1
        for n, draft in enumerate(drafts):
            row, real = draft.row, len(draft.row.tokens)
            table[n, : len(row.pages)] = row.pages
            table[n, len(row.pages) :] = row.pages[-1] if len(row.pages) else SINK
            columns[0, n], columns[1, n] = row.tokens[0], row.past
            columns[0, n, :real] = row.tokens
            columns[1, n, :real] += draft.tree.depths
            columns[4, n] = 1 << nodes
            columns[4, n, :real] = [sum(1 << node for node in path) for path in draft.tree.paths]
            at = row.past + nodes
            block = np.minimum(at // page_tokens, self.size.pages - 1)
            columns[2, n] = np.where(nodes < real, table[n, block], SINK)
            columns[3, n] = at % page_tokens
            accepted[n, : len(draft.accepted)] = draft.accepted
            lengths[:, n] = SKIPPED if row.state is None else row.state, row.past + len(nodes)
        self._staging.send()

    def ancestors(self) -> Tensor:
        """Which tokens of its draft each token sees, [rows, tokens, tokens] bool."""
        bits = torch.arange(self.size.tokens, device=self.sees.device)
        return (self.sees[..., None] >> bits & 1).bool()
