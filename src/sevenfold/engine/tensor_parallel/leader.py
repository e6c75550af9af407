"""The worker of the first rank: what it is told, it tells all ranks."""

from collections.abc import Sequence

from torch import Tensor

from sevenfold.engine.cache import Fresh
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.rows import Row
from sevenfold.engine.speculation.verifier import Checked, DraftRow
from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.tensor_parallel.messages import Orders
from sevenfold.engine.worker import Note, Worker, WorkerConfig
from sevenfold.models import HybridModel


class LeadingWorker(Worker):
    """A Worker whose ranks do the same, in the same order; one message for each run of the model.

    Whatever needs no other rank is told with the next run.
    """

    def __init__(
        self, model: HybridModel, plan: MemoryPlan, config: WorkerConfig, channel: Channel
    ) -> None:
        """Allocate the plan's memory; arguments but channel as Worker's."""
        super().__init__(model, plan, config)
        self._channel, self._orders = channel, Orders()
        self.ahead = None  # the other ranks are told ids

    def warm_up(self, most_tokens: int, chunk_tokens: int, note: Note) -> None:
        """As Worker.warm_up, on all ranks."""
        self._orders.warm_up(most_tokens, chunk_tokens)
        self._channel.send(self._orders.take())
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

    def run(self, rows: Sequence[Row]) -> Tensor:
        """As Worker.run, on all ranks."""
        self._orders.run(rows)
        self._channel.send(self._orders.take())
        return super().run(rows)

    def check(self, drafts: Sequence[DraftRow]) -> Checked:
        """As Worker.check, on all ranks."""
        self._orders.check(drafts)
        self._channel.send(self._orders.take())
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

    def stop(self) -> None:
        """End the other ranks' following."""
        self._orders.stop()
        self._channel.send(self._orders.take())
