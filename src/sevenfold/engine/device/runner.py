"""Runs the model on rows whose states and keys stay where they lie, without waiting for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sevenfold.engine.cache import Fresh
from sevenfold.engine.device.capture import Capture, run_once
from sevenfold.engine.device.decode_inputs import DecodeInputs, Size
from sevenfold.engine.device.graphs import DecodeGraphs, most_pages
from sevenfold.engine.device.prefill_graphs import MOST_STOPS, PrefillGraphs, most_keys
from sevenfold.engine.device.prefill_inputs import PrefillInputs
from sevenfold.engine.item_words import MOST_CLEARED, NOTHING, state_of
from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.prompt_logprobs import score_rows
from sevenfold.engine.rows import NextRow, Row
from sevenfold.engine.runner import Runner
from sevenfold.engine.storage import EncodedStorage, KVStorage, LinearStorage, Storage
from sevenfold.engine.transfer import upload_parts
from sevenfold.models import Batch, HybridModel, LayerState, PagedKV, PageTable, PooledState
from sevenfold.ops import Noise, PaddedSnapshots, Snapshots, Stop, advance_rows, padded_cuts


class Stepped(NamedTuple):
    """What a decoding step gave; the next one overwrites it.

    logits: [N, vocab_size] fp32.
    best: [N, 2] int64, the most probable token's id, and whether the row's logits are finite.
    """

    logits: Tensor
    best: Tensor


class DeviceRunner:
    """A model over the storage of the requests that it runs; results as engine.runner.Runner's.

    Indices go to the device in one copy a run. Decoding advances states in the arena by their
    slots; a prefill writes snapshots on its way, in one run. A prefill of one row is recorded, too.
    Prefills of states or snapshots in fewer bits go as engine.runner.Runner's, part by part.
    """

    def __init__(
        self,
        model: HybridModel,
        storage: Storage,
        *,
        page_tokens: int,
        batch_sizes: Sequence[int] = (),
        prefill_sizes: Sequence[int] = (),
        capture: Capture | None = None,
        cuts_change_bits: bool = True,
    ) -> None:
        """Record nothing yet.

        Args:
            model: in the storage's dtype, on its device.
            storage: of its states, snapshots and pages.
            page_tokens: tokens of a page.
            batch_sizes: of decoding steps that are recorded; none without `capture`.
            prefill_sizes: tokens of prefills that are recorded, rising; none without `capture`, and
                none of a storage in fewer bits.
            capture: records them; None runs each step as it comes.
            cuts_change_bits: whether long chunks may go block by block, whose bits depend on where
                a prompt is cut.
        """
        self.model, self.storage, self.page_tokens = model.eval(), storage, page_tokens
        self.batch_sizes, self.capture = tuple(batch_sizes), capture
        self.prefill_sizes = tuple(prefill_sizes)
        self._cuts_change_bits = cuts_change_bits
        self._by_parts = None
        if not storage.is_exact:
            self._by_parts = Runner(model, storage, page_tokens=page_tokens)
        self._graphs, self._prefills, self._words = None, None, storage.words
        if capture is not None:
            self._graphs = DecodeGraphs(self._step, capture, batch_sizes, device=model.device)
        if capture is not None and prefill_sizes:
            self._prefills = PrefillGraphs(
                self._prefill_step, capture, prefill_sizes, self._new_prefill_inputs
            )
            if self._words is not None:
                self._copied = self._words.new_state()

    def rehearsal(self) -> "DeviceRunner":
        """Return a runner that computes the same, and runs once what this one records."""
        return DeviceRunner(
            self.model,
            self.storage,
            page_tokens=self.page_tokens,
            batch_sizes=self.batch_sizes,
            prefill_sizes=self.prefill_sizes,
            capture=self.capture and run_once,
            cuts_change_bits=self._cuts_change_bits,
        )

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Tensor:
        """Run new tokens of N requests, one or more, and write their snapshots.

        Returns:
            [N, vocab_size] fp32, the logits after each row's last token; the next run may overwrite
            it.
        """
        if all(len(row.tokens) == 1 and row.scored is None for row in rows):
            return self._decode(rows)
        return self._prefill(rows) if self._by_parts is None else self._by_parts.run(rows)

    def run_readied(self, row: Row, fresh: Fresh, snapshot: int | None) -> Stepped | None:
        """Clear fresh items, read a row's state from a snapshot if it has one, and run the row.

        Not in inference mode, whose beginning takes longer than the copy of the inputs: a replay
        builds no graph for gradients.

        Returns:
            Logits as run's, and the choice; None, and nothing is done, where that takes more than
            one launch.
        """
        words, size = self._words, None
        if self._prefills is not None and len(row.tokens) > 1:
            size = self._prefills.size_of((row,))
        more = fresh.states or fresh.saved or fresh.loaded or len(fresh.pages) > MOST_CLEARED
        if self._prefills is None or words is None or size is None or more:
            return None
        places = words.places(fresh.pages, snapshot, row.state)
        return Stepped(*self._prefills.run(size, row, places))

    @torch.inference_mode()
    def run_ahead(self, rows: Sequence[NextRow | None], tokens: Tensor) -> Stepped:
        """Run the next tokens of requests before they have come to the host.

        Where the rows are those of the step before, and the tokens those that it gave as best, one
        launch does it.

        Args:
            rows: N, not all None; None leaves its place in the step to nobody.
            tokens: [N] int64, their ids on the device.

        Returns:
            Logits as run's, and the choice; no snapshot is written.
        """
        return self._decoded(rows, lambda at: at.fill_ahead(rows, tokens, self.page_tokens))

    def num_step_rows(self, needed: int) -> int:
        """Return how many rows a decoding step of as many requests computes, padding included."""
        recorded = None if self._graphs is None else self._graphs.num_rows(needed)
        return recorded or needed

    def _decode(self, rows: Sequence[Row]) -> Tensor:
        logits = self._decoded(rows, lambda at: at.fill(rows, self.page_tokens)).logits
        kept = [(row.state, at) for row in rows for at in row.snapshots.values()]
        self.storage.snapshot([s for s, _ in kept if s is not None], [at for _, at in kept])
        return logits

    def _decoded(
        self, rows: Sequence[Row | NextRow | None], fill: Callable[[DecodeInputs], None]
    ) -> Stepped:
        size = None if self._graphs is None else self._graphs.size_of(rows)
        if self._graphs is not None and size is not None:
            logits, inputs = self._graphs.run(size, fill)
            return Stepped(logits[: len(rows)], inputs.chosen[: len(rows)])
        inputs = DecodeInputs(Size(len(rows), most_pages(rows)), self.model.device)
        fill(inputs)
        return Stepped(self._step(inputs), inputs.chosen)

    def _step(self, inputs: DecodeInputs) -> Tensor:
        rows = inputs.size.rows
        batch = Batch((1,) * rows, (0,) * rows, inputs.positions, None)
        table = PageTable(inputs.pages, inputs.page, inputs.place, inputs.key_lengths)
        noise = (inputs.seeds, inputs.key_lengths)
        state = self._values(inputs.slots, table, lambda pool: Snapshots(pool, ()), noise)
        logits = self.model.logits(self.model.hidden(inputs.ids, batch, state).hidden[:, 0])
        where = (inputs.places, inputs.pages)
        advance_rows(logits, inputs.chosen, *where, page_tokens=self.page_tokens)
        return logits

    def _prefill(self, rows: Sequence[Row]) -> Tensor:
        size = None if self._prefills is None else self._prefills.size_of(rows)
        if self._prefills is not None and size is not None:
            words, row = self._words, rows[0]
            places = NOTHING if words is None else words.places((), None, row.state)
            return self._prefills.run(size, row, places)[0]
        parts = upload_parts(_prefill_inputs(rows, self.page_tokens), self.model.device)
        ids, positions, page, place, slots, key_lengths, starts, pages = parts
        lengths, past = (tuple(x) for x in ([len(r.tokens) for r in rows], [r.past for r in rows]))
        borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        batch = Batch(lengths, past, positions[None], borders)
        pages = pages.view(len(rows), -1)
        known = past if self._cuts_change_bits else None
        table = PageTable(pages, page, place, key_lengths, starts, known)
        stops = _stops(rows)
        state = self._values(slots, table, lambda pool: Snapshots(pool, stops))
        ends = starts[1:] - 1
        if any(row.scored is not None for row in rows):
            hidden = self.model.hidden(ids[None], batch, state).hidden[0]
            score_rows(self.model, rows, hidden)
            return self.model.logits(hidden[ends])
        found = self.model.hidden_at_ends(ids[None], batch, state, ends)
        return self.model.logits(found.hidden[:, 0])

    def _new_prefill_inputs(self, tokens: int) -> PrefillInputs:
        pools = [layer.states for layer in self.storage.layers if isinstance(layer, LinearStorage)]
        H, K, V = pools[0].shape[1:] if pools else (1, 1, 1)
        cuts = padded_cuts(tokens, (H, K, V), MOST_STOPS, self.model.embed_tokens.weight)
        most, device = -(-most_keys(tokens) // self.page_tokens), self.model.device
        return PrefillInputs(cuts, most, self.page_tokens, device)

    def _prefill_step(self, inputs: PrefillInputs) -> Tensor:
        batch = Batch((inputs.tokens,), (0,), inputs.positions, None)
        where = (inputs.pages, inputs.page, inputs.place)
        table = PageTable(*where, inputs.key_lengths, inputs.borders)
        inputs.send()
        if self._words is not None:
            self._words.ready(self._copied, inputs.places)
        plan = inputs.plan()  # once for all layers
        state = self._values(inputs.slots, table, lambda pool: PaddedSnapshots(pool, plan))
        if self._words is not None:
            state = tuple(self._read_copied(layer) for layer in state)
        found = self.model.hidden_at_ends(inputs.ids, batch, state, inputs.last)
        logits = self.model.logits(found.hidden[:, 0])
        # A row without keys stays where it is: what is left is the choice.
        where = (inputs.nowhere, inputs.pages)
        advance_rows(logits, inputs.chosen, *where, page_tokens=self.page_tokens)
        return logits

    def _read_copied(self, layer: LayerState) -> LayerState:
        if not isinstance(layer, PooledState):
            return layer
        return replace(layer, before=state_of(self._copied, layer.pool))

    def _values(
        self,
        slots: Tensor,
        table: PageTable,
        kept: Callable[[Tensor], Snapshots | PaddedSnapshots],
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[LayerState, ...]:
        """Each layer's part of a state.

        Args:
            slots: of the rows' states.
            table: of their pages.
            kept: says what to keep in a pool of snapshots.
            noise: seeds and tokens of the rows, by which states in fewer bits are rounded.
        """
        values: list[LayerState] = []
        for n, layer in enumerate(self.storage.layers):
            if isinstance(layer, KVStorage):
                values.append(PagedKV(layer.k, layer.v, table))
            elif isinstance(layer, EncodedStorage):
                if noise is None:
                    raise AssertionError("states in fewer bits have no prefill here")
                values.append(layer.states.at(slots, Noise(*noise, n)))
            else:
                pool = layer.snapshots.exact
                # Rounded ones are not written on the way: any pool will do.
                pool = layer.states if pool is None else pool
                values.append(PooledState(layer.states, slots, kept(pool)))
        return tuple(values)


def _stops(rows: Sequence[Row]) -> tuple[Stop, ...]:
    return tuple(
        Stop(n, at - row.past, slot)
        for n, row in enumerate(rows)
        for at, slot in row.snapshots.items()
    )


def _prefill_inputs(rows: Sequence[Row], page_tokens: int) -> list[np.ndarray]:
    """ids, positions, page, place of each token; slot, keys and start of each row; its pages."""
    most = max(1, *(len(row.pages) for row in rows))
    table = np.full((len(rows), most), SINK)
    for n, row in enumerate(rows):
        table[n, : len(row.pages)] = row.pages
    lengths = [len(row.tokens) for row in rows]
    ids = np.concatenate([np.fromiter(row.tokens, np.int64) for row in rows])
    positions = np.concatenate([np.arange(row.past, row.end) for row in rows])
    block = np.minimum(positions // page_tokens, most - 1)
    page = table[np.repeat(np.arange(len(rows)), lengths), block]
    slots = np.array([SINK if row.state is None else row.state for row in rows])
    keys = np.array([row.end for row in rows])
    starts = np.cumsum([0, *lengths])
    return [ids, positions, page, positions % page_tokens, slots, keys, starts, table.ravel()]
