"""Runs drafts where the model lies on a GPU: one upload a run, by captured graphs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.engine.device.capture import Capture, run_once
from sevenfold.engine.device.draft_inputs import Draft, DraftInputs, DraftSize
from sevenfold.engine.device.graphs import Recorder, draft_token_sizes, least_size, page_room
from sevenfold.engine.rows import Row
from sevenfold.engine.speculation.pending import PendingDrafts
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import Checked, Verifier
from sevenfold.engine.storage import KVStorage, LinearStorage, Storage
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


@dataclass(frozen=True)
class DraftLimits:
    """What drafts there may be.

    tokens: of one, its root among them, at most. are_trees: whether they may be more than chains.
    """

    tokens: int
    are_trees: bool


class DeviceVerifier(Verifier):
    """Verifies in rows of equal length, so that a graph can hold a run; results as Verifier's.

    A run reads drafts, slots, tables and accepted tokens from one buffer, and folds what each state
    lacks into it or its ring on the way. Nothing waits for the device.
    """

    def __init__(
        self,
        model: HybridModel,
        storage: Storage,
        pending: PendingDrafts,
        limits: DraftLimits,
        *,
        page_tokens: int,
        batch_sizes: Sequence[int] = (),
        capture: Capture | None = None,
    ) -> None:
        """Record nothing yet.

        Args:
            model: in the storage's dtype, on its device.
            storage: of states in fp32 with rings for drafts, snapshots in fp32, and pages.
            pending: what the storage's states lack.
            limits: of the drafts.
            page_tokens: tokens of a page.
            batch_sizes: rows of runs that are recorded; none without `capture`.
            capture: records them; None runs each as it comes.
        """
        super().__init__(model, storage, pending, page_tokens=page_tokens)
        self._limits, self._batch_sizes, self._capture = limits, tuple(batch_sizes), capture
        self._recorder: Recorder[DraftSize, DraftInputs] | None = None
        if capture is not None:
            self._recorder = Recorder(
                self._step, capture, lambda size: DraftInputs(size, model.device), {}
            )

    def rehearsal(self) -> "DeviceVerifier":
        """Return a verifier that computes the same, and runs once what this one records."""
        return DeviceVerifier(
            self._model,
            self._storage,
            self._pending,
            self._limits,
            page_tokens=self._page_tokens,
            batch_sizes=self._batch_sizes,
            capture=self._capture and run_once,
        )

    def _run(self, rows: list[Row], trees: list[DraftTree]) -> Checked:
        has_states = rows[0].state is not None
        taken = self._pending.take([row.state or 0 for row in rows]) if has_states else []
        accepted = taken or [[]] * len(rows)
        drafts = [Draft(*each) for each in zip(rows, trees, accepted, strict=True)]
        size = self._size_of(drafts)
        if self._recorder is None or size.rows < len(rows):
            inputs = DraftInputs(DraftSize(len(rows), size.tokens, size.pages), self._model.device)
            inputs.fill(drafts, self._page_tokens)
            logits = self._step(inputs)
        else:
            inputs, captured = self._recorder.at(size)
            inputs.fill(drafts, self._page_tokens)
            captured.replay()
            logits = captured.output
        tokens = inputs.size.tokens
        return Checked(logits[: len(rows) * tokens], range(0, len(rows) * tokens, tokens))

    def _size_of(self, drafts: Sequence[Draft]) -> DraftSize:
        """The least size that holds the drafts; no rows where they are more than any."""
        most = max(len(draft.row.tokens) for draft in drafts)
        tokens = least_size(draft_token_sizes(self._limits.tokens), most) or most
        pages = max(
            max(len(draft.row.pages), -(-(draft.row.past + tokens) // self._page_tokens))
            for draft in drafts
        )
        rows = least_size(self._batch_sizes, len(drafts)) or 0
        return DraftSize(rows, tokens, page_room(pages))

    def _step(self, inputs: DraftInputs) -> Tensor:
        rows, tokens = inputs.size.rows, inputs.size.tokens
        batch = Batch((tokens,) * rows, (0,) * rows, inputs.positions, None)
        layout = DraftLayout(
            num_tokens=tokens,
            place=None,
            accepted=inputs.accepted.int(),
            ancestors=inputs.ancestors() if self._limits.are_trees else None,
        )
        table = PageTable(inputs.pages, inputs.page, inputs.place, inputs.key_lengths)
        state = tuple(
            self._device_value(layer, inputs.slots, layout, table) for layer in self._storage.layers
        )
        hidden = self._model.hidden(inputs.ids, batch, state).hidden
        return self._model.logits(hidden.flatten(0, 1))

    def _device_value(
        self, layer: object, slots: Tensor, layout: DraftLayout, table: PageTable
    ) -> LayerState:
        if isinstance(layer, KVStorage):
            if layout.ancestors is None:
                return PagedKV(layer.k, layer.v, table)
            return PagedTree(layer.k, layer.v, table, layout.ancestors)
        if not isinstance(layer, LinearStorage) or layer.drafts is None:
            raise UnsupportedError("states must be fp32 with rings for DeviceVerifier")
        return DraftedState(layer.drafts, slots, layout)
