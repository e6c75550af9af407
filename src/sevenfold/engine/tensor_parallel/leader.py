"""The worker of the first rank: what it is told, it tells all ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from sevenfold.engine.cache import Fresh
from sevenfold.engine.device import Stepped
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.rows import NextRow, Row
from sevenfold.engine.speculation.verifier import Checked, DraftRow
from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.tensor_parallel.messages import NextStep, Orders
from sevenfold.engine.worker import Note, Prefilled, RunsAhead, Worker, WorkerConfig
from sevenfold.models import HybridModel


class LeadingWorker(Worker):
    """A Worker whose ranks do the same, in the same order; one message for each run of the model.

    Whatever needs no other rank is told with the next run.

    has_left: whether this rank broke off what it had told the others to do: they wait for it there,
        and hear nothing any more.
    """

    def __init__(
        self, model: HybridModel, plan: MemoryPlan, config: WorkerConfig, channel: Channel
    ) -> None:
        """Allocate the plan's memory; arguments but channel as Worker's."""
        super().__init__(model, plan, config)
        self._channel, self._orders = channel, Orders()
        self.has_left = False
        if self.ahead is not None:
            self.ahead = _LeadingAhead(self.ahead, self._orders, channel, self._together)

    def warm_up(self, most_tokens: int, chunk_tokens: int, note: Note) -> None:
        """As Worker.warm_up, on all ranks."""
        self._orders.warm_up(most_tokens, chunk_tokens)
        with self._together():
            super().warm_up(most_tokens, chunk_tokens, note)

    def prepare(self, fresh: Fresh) -> None:
        """As Worker.prepare, on all ranks."""
        if fresh.states or fresh.pages or fresh.saved or fresh.loaded:
            self._orders.prepare(fresh)
        super().prepare(fresh)

    def restore(self, snapshots: Sequence[int], states: Sequence[int]) -> None:
        """As Worker.restore, on all ranks."""
        if snapshots:
            self._orders.restore(snapshots, states)
        super().restore(snapshots, states)

    def snapshot(self, states: Sequence[int], snapshots: Sequence[int]) -> None:
        """As Worker.snapshot, on all ranks."""
        if states:
            self._orders.snapshot(states, snapshots)
        super().snapshot(states, snapshots)

    def run(self, rows: Sequence[Row]) -> Tensor:
        """As Worker.run, on all ranks."""
        self._orders.run(rows)
        with self._together():
            return super().run(rows)

    def prefill(self, fresh: Fresh, restored: Sequence[tuple[int, int]], row: Row) -> Prefilled:
        """As Worker.prefill, on all ranks; each is told to do one after the other."""
        return self._prefill(fresh, restored, row)

    def check(self, drafts: Sequence[DraftRow]) -> Checked:
        """As Worker.check, on all ranks."""
        self._orders.check(drafts)
        with self._together():
            return super().check(drafts)

    def accept(
        self,
        accepted: Sequence[tuple[DraftRow, Sequence[int]]],
        *,
        rejected: Sequence[DraftRow],
    ) -> None:
        """As Worker.accept, on all ranks."""
        self._orders.accept(accepted, rejected)
        super().accept(accepted, rejected=rejected)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Tell the others what was ordered, and do it within: an error leaves them there.

        Raises:
            RuntimeError: they were left before.
        """
        if self.has_left:
            raise RuntimeError(
                "all ranks must take every step, but this one broke one off, by an error or an "
                "interrupt: close() it, and build another"
            )
        self.has_left = True
        self._channel.send(self._orders.take())
        yield
        self.has_left = False

    def stop(self) -> None:
        """End the other ranks' following."""
        self._orders.stop()
        self._channel.send(self._orders.take())


class _LeadingAhead:
    """Runs tokens that are on the first rank's device alone, on all ranks.

    Most steps have the rows of the step before, and the tokens that every rank has found itself:
    then hardly anything is told.
    """

    def __init__(
        self,
        runner: RunsAhead,
        orders: Orders,
        channel: Channel,
        together: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._runner, self._orders, self._channel = runner, orders, channel
        self._together = together
        self._rows: Sequence[NextRow | None] = ()
        self._best = torch.empty(0)

    def num_step_rows(self, needed: int) -> int:
        """As DeviceRunner.num_step_rows."""
        return self._runner.num_step_rows(needed)

    def run_ahead(self, rows: Sequence[NextRow | None], tokens: Tensor) -> Stepped:
        """As DeviceRunner.run_ahead, on all ranks."""
        is_own = tokens.data_ptr() == self._best.data_ptr()
        told = None if _follow(rows, self._rows) else list(rows)
        self._orders.next_step(NextStep(told, is_own))
        with self._together():
            if not is_own:
                tokens = tokens.contiguous()
                self._channel.share(tokens)
            stepped = self._runner.run_ahead(rows, tokens)
        self._rows, self._best = rows, stepped.best
        return stepped


def _follow(rows: Sequence[NextRow | None], before: Sequence[NextRow | None]) -> bool:
    """Whether rows are those of the step before, one token on; pages that change are others."""
    return len(rows) == len(before) and all(
        (new is None and old is None)
        or (new and old and new[:2] == (old.past + 1, old.state) and new.pages is old.pages)
        for new, old in zip(rows, before, strict=True)
    )
