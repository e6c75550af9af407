"""Runs drafts through the model, from the states before them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import noise_of, page_table
from sevenfold.engine.speculation.pending import PendingDrafts, accepted_table
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.storage import EncodedStorage, KVStorage, LinearStorage, Storage
from sevenfold.engine.transfer import upload_parts
from sevenfold.models import (
    Batch,
    DraftedState,
    DraftLayout,
    HybridModel,
    LayerState,
    PagedKV,
    PagedTree,
    PageTable,
)
from sevenfold.ops import Noise


@dataclass(frozen=True)
class DraftRow:
    """A draft of one request.

    row: the root and the guesses as its tokens, with room in its pages for all of them.
    tree: the guesses.
    """

    row: Row
    tree: DraftTree

    @classmethod
    def of(cls, row: Row, tree: DraftTree) -> "DraftRow":
        """Put guesses behind the root, which is all that a row has of tokens."""
        return cls(row._replace(tokens=(*row.tokens, *tree.tokens)), tree)


class Checked(NamedTuple):
    """What a run of drafts gave.

    logits: [rows, vocab_size] fp32; the next run may overwrite them.
    first: the row of each draft's root; its other nodes' rows follow.
    """

    logits: Tensor
    first: Sequence[int]


class Verifier:
    """A model over the storage of the requests whose drafts it checks.

    It reads each state as it is before the draft, keeps the draft's keys and values beside it, and
    stores no state for a guess. What is not accepted is overwritten by the next call.
    """

    def __init__(
        self, model: HybridModel, storage: Storage, pending: PendingDrafts, *, page_tokens: int
    ) -> None:
        self._model, self._storage, self._pending = model.eval(), storage, pending
        self._page_tokens = page_tokens

    def rehearsal(self) -> "Verifier":
        """Return a verifier that computes the same and records nothing: this one."""
        return self

    @torch.inference_mode()
    def run(self, drafts: Sequence[DraftRow]) -> Checked:
        """Check drafts of N requests, one or more: the logits after each node of each tree."""
        # A snapshot needs the state itself, on the way through the draft.
        rows = [draft.row for draft in drafts]
        self._pending.commit([row.state or SINK for row in rows if row.snapshots])
        return self._run(rows, [draft.tree for draft in drafts])

    def _run(self, rows: list[Row], trees: list[DraftTree]) -> Checked:
        device = self._model.device
        past = [row.past for row in rows]
        batch = Batch.drafts([tree.depths for tree in trees], past=past, device=device)
        ids = torch.tensor([[token for row in rows for token in row.tokens]]).to(device)
        hidden = self._model.hidden(ids, batch, self._values(rows, trees)).hidden
        first = list(accumulate((len(row.tokens) for row in rows), initial=0))
        return Checked(self._model.logits(hidden[0]), first[:-1])

    @torch.inference_mode()
    def accept(self, accepted: Sequence[tuple[DraftRow, Sequence[int]]]) -> None:
        """Take the nodes of drafts that were right, root to last, and write the snapshots due."""
        self._move_keys([(draft.row, path) for draft, path in accepted])
        for draft, path in accepted:
            row = draft.row
            if row.state is not None:
                self._pending.accept(row, path)
                self._write_snapshots(row, row.past + len(path))

    @torch.inference_mode()
    def reject(self, drafts: Sequence[DraftRow]) -> None:
        """Clear the keys of drafts whose guesses are not finite: a mask does not hide a NaN."""
        places = [self._located(d.row, np.arange(d.row.past, d.row.end)) for d in drafts]
        for layer, page, place in self._stored(*places):
            layer.k[page, place] = layer.v[page, place] = 0

    def _write_snapshots(self, row: Row, end: int) -> None:
        if row.state is None:
            return
        done = row.past
        for at in sorted(at for at in row.snapshots if at <= end):
            self._pending.stop(row, at - done)
            self._storage.snapshot([row.state], [row.snapshots[at]])
            done = at

    def _values(self, rows: list[Row], trees: list[DraftTree]) -> tuple[LayerState, ...]:
        lengths = [len(row.tokens) for row in rows]
        table = page_table(rows, lengths, self._page_tokens, self._model.device)
        ancestors = None
        if not all(tree.is_chain for tree in trees):
            ancestors = _ancestors(trees).to(self._model.device)
        slots, taken = [row.state or SINK for row in rows], []
        if rows[0].state is not None:
            taken = self._pending.take(slots)
        layout = DraftLayout(
            num_tokens=max(lengths),
            place=_places(lengths).to(self._model.device),
            accepted=accepted_table(taken, self._model.device) if any(taken) else None,
            ancestors=ancestors,
        )
        at = torch.tensor(slots).to(self._model.device)
        seeds, past = [row.seed for row in rows], [row.past for row in rows]
        return tuple(
            self._value(layer, at, layout, table, noise_of(seeds, past, n, self._model.device))
            for n, layer in enumerate(self._storage.layers)
        )

    def _value(
        self,
        layer: LinearStorage | EncodedStorage | KVStorage,
        slots: Tensor,
        layout: DraftLayout,
        table: PageTable,
        noise: Noise,
    ) -> LayerState:
        if isinstance(layer, KVStorage):
            if layout.ancestors is None:
                return PagedKV(layer.k, layer.v, table)
            return PagedTree(layer.k, layer.v, table, layout.ancestors)
        if layer.drafts is None:
            raise AssertionError("a plan without rings is refused before anything runs")
        return DraftedState(layer.drafts, slots, layout, noise)

    def _move_keys(self, accepted: Sequence[tuple[Row, Sequence[int]]]) -> None:
        """Put the keys of accepted nodes into the places of their tokens."""
        source, target = [], []
        for row, path in accepted:
            moved = np.array([(node, n) for n, node in enumerate(path) if node != n], dtype=int)
            if len(moved) and row.pages:
                source.append(self._located(row, row.past + moved[:, 0]))
                target.append(self._located(row, row.past + moved[:, 1]))
        num_moved = sum(place.shape[1] for place in source)
        for layer, page, place in self._stored(*source, *target):
            for stored in (layer.k, layer.v):
                kept = stored[page[:num_moved], place[:num_moved]]
                stored[page[num_moved:], place[num_moved:]] = kept

    def _located(self, row: Row, tokens: np.ndarray) -> np.ndarray:
        """Page, and place in it, of a row's tokens: [2, tokens]."""
        if not row.pages:
            return np.empty((2, 0), dtype=int)
        page = np.asarray(row.pages)[tokens // self._page_tokens]
        return np.stack([page, tokens % self._page_tokens])

    def _stored(self, *places: np.ndarray) -> Iterator[tuple[KVStorage, Tensor, Tensor]]:
        """Every softmax layer's keys, with page and place in it; none without places."""
        if not sum(place.shape[1] for place in places):
            return
        page, place = upload_parts(list(np.concatenate(places, axis=1)), self._model.device)
        for layer in self._storage.layers:
            if isinstance(layer, KVStorage):
                yield layer, page, place


def _places(lengths: Sequence[int]) -> Tensor:
    """Where packed tokens lie in rows of the longest one's length."""
    most = max(lengths)
    return torch.cat([torch.arange(n) + i * most for i, n in enumerate(lengths)])


def _ancestors(trees: Sequence[DraftTree]) -> Tensor:
    """[N, T, T] bool; a node beyond a tree's last sees itself alone."""
    most = max(len(tree) for tree in trees) + 1
    sees = torch.eye(most, dtype=torch.bool).repeat(len(trees), 1, 1)
    for n, tree in enumerate(trees):
        for node, path in enumerate(tree.paths):
            sees[n, node, list(path)] = True
    return sees
