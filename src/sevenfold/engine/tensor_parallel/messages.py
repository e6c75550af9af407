"""What the first rank tells the others, as 64-bit integers: no code and no objects travel."""

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from sevenfold.engine.cache import Copy, Fresh
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.rows import NextRow, Row, Scored
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import DraftRow
from sevenfold.engine.worker import Worker

_NO_STATE = _NOT_SCORED = _NO_ROW = -1


class _Order(IntEnum):
    STOP = 0
    PREPARE = 1
    RESTORE = 2
    RUN = 3
    CHECK = 4
    ACCEPT = 5
    WARM_UP = 6
    SNAPSHOT = 7
    NEXT_STEP = 8


class NextStep(NamedTuple):
    """A decoding step whose tokens are on the first rank's device.

    rows: as DeviceRunner.run_ahead's; None are those of the next step before this, one token on.
    is_own: whether the tokens are those that every rank's last step found to be most probable.
    """

    rows: list[NextRow | None] | None
    is_own: bool


Order = Callable[[Worker], object]


class Orders:
    """Orders for a worker, one after another, until they are sent."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def stop(self) -> None:
        """End the follower."""
        self._numbers(_Order.STOP)

    def warm_up(self, most_tokens: int, chunk_tokens: int) -> None:
        """As Worker.warm_up; followers say nothing of it."""
        self._numbers(_Order.WARM_UP, most_tokens, chunk_tokens)

    def prepare(self, fresh: Fresh) -> None:
        """As Worker.prepare."""
        self._numbers(_Order.PREPARE)
        self._lists(fresh.states, fresh.pages)
        for copies in (fresh.saved, fresh.loaded):
            self._lists([number for copy in copies for number in copy])

    def restore(self, snapshots: Sequence[int], states: Sequence[int]) -> None:
        """As Worker.restore."""
        self._numbers(_Order.RESTORE)
        self._lists(snapshots, states)

    def run(self, rows: Sequence[Row]) -> None:
        """As Worker.run."""
        self._numbers(_Order.RUN, len(rows))
        for row in rows:
            self._row(row)

    def snapshot(self, states: Sequence[int], snapshots: Sequence[int]) -> None:
        """As Worker.snapshot."""
        self._numbers(_Order.SNAPSHOT)
        self._lists(states, snapshots)

    def next_step(self, step: NextStep) -> None:
        """Run tokens that come from device to device."""
        num_rows = _NO_ROW if step.rows is None else len(step.rows)
        self._numbers(_Order.NEXT_STEP, step.is_own, num_rows)
        for row in step.rows or ():
            if row is None:
                self._numbers(_NO_ROW)
            else:
                self._numbers(row.past, _NO_STATE if row.state is None else row.state)
                self._lists(row.pages)

    def check(self, drafts: Sequence[DraftRow]) -> None:
        """As Worker.check."""
        self._numbers(_Order.CHECK, len(drafts))
        for draft in drafts:
            self._draft(draft)

    def accept(
        self,
        accepted: Sequence[tuple[DraftRow, Sequence[int]]],
        rejected: Sequence[DraftRow],
    ) -> None:
        """As Worker.accept."""
        self._numbers(_Order.ACCEPT, len(accepted), len(rejected))
        for draft, path in accepted:
            self._draft(draft)
            self._lists(path)
        for draft in rejected:
            self._draft(draft)

    def take(self) -> np.ndarray:
        """Return all orders given so far, once."""
        parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _draft(self, draft: DraftRow) -> None:
        self._row(draft.row)
        self._lists(draft.tree.tokens, draft.tree.parents)

    def _row(self, row: Row) -> None:
        state = _NO_STATE if row.state is None else row.state
        num_top = _NOT_SCORED if row.scored is None else row.scored.num_top
        self._numbers(row.past, state, row.seed - (row.seed >> 63 << 64), num_top)
        self._lists(() if row.scored is None else row.scored.targets)
        self._lists(row.tokens, row.pages, list(row.snapshots), list(row.snapshots.values()))

    def _numbers(self, *numbers: int) -> None:
        self._parts.append(np.array(numbers, dtype=np.int64))

    def _lists(self, *lists: Sequence[int]) -> None:
        for numbers in lists:
            self._numbers(len(numbers))
            self._parts.append(np.asarray(numbers, dtype=np.int64))


def read_orders(message: np.ndarray) -> Iterator[Order | NextStep | None]:
    """Return what a message orders, one after another; None ends the follower."""
    reader = _Reader(message)
    while not reader.is_over:
        yield _READ[_Order(reader.number())](reader)


class _Reader:
    def __init__(self, message: np.ndarray) -> None:
        self._message, self._at = message, 0

    @property
    def is_over(self) -> bool:
        return self._at == len(self._message)

    def number(self) -> int:
        self._at += 1
        return int(self._message[self._at - 1])

    def numbers(self) -> list[int]:
        return self.array().tolist()

    def array(self) -> np.ndarray:
        length = self.number()
        self._at += length
        return self._message[self._at - length : self._at]

    def copies(self) -> list[Copy]:
        numbers = self.array().reshape(-1, 3).tolist()
        return [Copy(Tenant(tenant), device, host) for tenant, device, host in numbers]

    def row(self) -> Row:
        past, state, seed, num_top = (self.number() for _ in range(4))
        targets = self.numbers()
        tokens, pages, places, kept = (self.numbers() for _ in range(4))
        return Row(
            tokens=tokens,
            past=past,
            state=None if state == _NO_STATE else state,
            pages=pages,
            snapshots=dict(zip(places, kept, strict=True)),
            seed=seed + (1 << 64) if seed < 0 else seed,
            scored=None if num_top == _NOT_SCORED else Scored(targets, num_top, []),
        )

    def next_row(self) -> NextRow | None:
        past = self.number()
        if past == _NO_ROW:
            return None
        state = self.number()
        return NextRow(past, None if state == _NO_STATE else state, self.numbers())

    def draft(self) -> DraftRow:
        row = self.row()
        return DraftRow(row, DraftTree(tuple(self.numbers()), tuple(self.numbers())))


def _stop(reader: _Reader) -> None:
    return None


def _snapshot(reader: _Reader) -> Order:
    states, snapshots = reader.numbers(), reader.numbers()
    return lambda worker: worker.snapshot(states, snapshots)


def _next_step(reader: _Reader) -> NextStep:
    is_own, num_rows = bool(reader.number()), reader.number()
    rows = None if num_rows == _NO_ROW else [reader.next_row() for _ in range(num_rows)]
    return NextStep(rows, is_own)


def _warm_up(reader: _Reader) -> Order:
    most_tokens, chunk_tokens = reader.number(), reader.number()
    return lambda worker: worker.warm_up(most_tokens, chunk_tokens, lambda _: None)


def _prepare(reader: _Reader) -> Order:
    fresh = Fresh(reader.numbers(), reader.numbers(), reader.copies(), reader.copies())
    return lambda worker: worker.prepare(fresh)


def _restore(reader: _Reader) -> Order:
    snapshots, states = reader.numbers(), reader.numbers()
    return lambda worker: worker.restore(snapshots, states)


def _run(reader: _Reader) -> Order:
    rows = [reader.row() for _ in range(reader.number())]
    return lambda worker: worker.run(rows)


def _check(reader: _Reader) -> Order:
    drafts = [reader.draft() for _ in range(reader.number())]
    return lambda worker: worker.check(drafts)


def _accept(reader: _Reader) -> Order:
    num_accepted, num_rejected = reader.number(), reader.number()
    accepted = [(reader.draft(), reader.numbers()) for _ in range(num_accepted)]
    rejected = [reader.draft() for _ in range(num_rejected)]
    return lambda worker: worker.accept(accepted, rejected=rejected)


_READ: dict[_Order, Callable[[_Reader], Order | NextStep | None]] = {
    _Order.STOP: _stop,
    _Order.PREPARE: _prepare,
    _Order.RESTORE: _restore,
    _Order.RUN: _run,
    _Order.CHECK: _check,
    _Order.ACCEPT: _accept,
    _Order.WARM_UP: _warm_up,
    _Order.SNAPSHOT: _snapshot,
    _Order.NEXT_STEP: _next_step,
}
