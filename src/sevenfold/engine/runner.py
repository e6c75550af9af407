"""Runs the model on rows of tokens whose states and keys lie in the engine's storage."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.prompt_logprobs import score_rows
from sevenfold.engine.rows import Row
from sevenfold.engine.storage import EncodedStorage, LinearStorage, Storage
from sevenfold.engine.transfer import upload
from sevenfold.models import Batch, HybridModel, LayerState, PagedKV, PageTable, PooledState
from sevenfold.ops import Noise


class Runner:
    """A model over the storage of the requests that it runs."""

    def __init__(self, model: HybridModel, storage: Storage, *, page_tokens: int) -> None:
        self.model, self.storage, self.page_tokens = model.eval(), storage, page_tokens

    def rehearsal(self) -> "Runner":
        """Return a runner that computes the same and records nothing: this one."""
        return self

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """Run new tokens of N requests, one or more, and write their snapshots.

        Returns:
            [N, vocab_size] fp32, the logits after each row's last token.
        """
        last: list[Tensor | None] = [None] * len(rows)
        parts = [row.parts() for row in rows]
        for depth in range(max(map(len, parts))):
            chosen = [n for n, row in enumerate(parts) if depth < len(row)]
            for group in self._together([parts[n][depth] for n in chosen], chosen):
                hidden = self._run([row for _, row in group])
                for (n, _), vector in zip(group, hidden, strict=True):
                    last[n] = vector
        return self.model.logits(torch.stack([x for x in last if x is not None]))

    def _together(self, rows: list[Row], names: list[int]) -> list[list[tuple[int, Row]]]:
        """Groups of rows that one run takes: all on a GPU, and all decode rows.

        On a CPU a packed run of the eager lightning attention would carry one sequence's NaN into
        its neighbours (docs/numerics.md), and saves nothing.
        """
        named = list(zip(names, rows, strict=True))
        if self.model.device.type == "cuda" or all(len(row.tokens) == 1 for row in rows):
            return [named]
        return [[one] for one in named]

    def _run(self, rows: list[Row]) -> Tensor:
        """Run rows whose snapshots are due at their ends: [N, hidden_size] after the last token."""
        device = self.model.device
        lengths, past = [len(row.tokens) for row in rows], [row.past for row in rows]
        ids = torch.tensor([token for row in rows for token in row.tokens])
        if max(lengths) == 1:
            batch = Batch.rows(len(rows), 1, past=past, device=device)
        else:
            batch = Batch.packed(lengths, past=past, device=device)
        ids = ids.view(batch.positions.shape).to(device)
        hidden = self.model.hidden(ids, batch, self._values(rows, lengths)).hidden.flatten(0, 1)
        score_rows(self.model, rows, hidden)
        kept = [(row.state, at) for row in rows for at in row.snapshots.values()]
        self.storage.snapshot(
            [state for state, _ in kept if state is not None], [s for _, s in kept]
        )
        if batch.is_step:
            return hidden
        ends = torch.tensor(lengths).cumsum(0) - 1
        return hidden[ends.to(device)]

    def _values(self, rows: list[Row], lengths: list[int]) -> tuple[LayerState, ...]:
        device = self.model.device
        slots = torch.tensor([row.state or SINK for row in rows]).to(device)
        table = page_table(rows, lengths, self.page_tokens, device)
        seeds, seen = [row.seed for row in rows], [row.end for row in rows]
        values: list[LayerState] = []
        for n, layer in enumerate(self.storage.layers):
            match layer:
                case LinearStorage():
                    values.append(PooledState(layer.states, slots))
                case EncodedStorage():
                    values.append(layer.states.at(slots, noise_of(seeds, seen, n, device)))
                case _:
                    values.append(PagedKV(layer.k, layer.v, table))
        return tuple(values)


def noise_of(seeds: Sequence[int], seen: Sequence[int], layer: int, device: torch.device) -> Noise:
    """Return what rounds the states of a layer after so many tokens of each request."""
    return Noise(upload([signed(seed) for seed in seeds], device), upload(seen, device), layer)


def signed(seed: int) -> int:
    """Return 64 bits as a signed integer, which is what tensors have."""
    return seed - (seed >> 63 << 64)


def page_table(
    rows: Sequence[Row], lengths: Sequence[int], page_tokens: int, device: torch.device
) -> PageTable:
    """Return where the new tokens of rows go, so many of each, and which pages they read."""
    # NumPy: on arrays this small a call of PyTorch's takes ten times as long.
    most = max(1, *(len(row.pages) for row in rows))
    pages = np.full((len(rows), most), SINK)
    for n, row in enumerate(rows):
        pages[n, : len(row.pages)] = row.pages
    row = np.repeat(np.arange(len(rows)), lengths)
    token = np.concatenate([np.arange(row.past, row.end) for row in rows])
    page = pages[row, np.minimum(token // page_tokens, most - 1)]
    at = (pages, page, token % page_tokens)
    all_pages, pages_of, places = (torch.from_numpy(x).to(device) for x in at)
    return PageTable(all_pages, pages_of, places)
