"""A rank that does what the first one says."""

from collections.abc import Sequence

import torch

from sevenfold.engine.rows import NextRow
from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.tensor_parallel.messages import NextStep, read_orders
from sevenfold.engine.worker import Worker


def follow(worker: Worker, channel: Channel) -> None:
    """Carry out orders until one of them ends it."""
    steps = _NextSteps(worker, channel)
    while True:
        for order in read_orders(channel.receive()):
            if order is None:
                return
            if isinstance(order, NextStep):
                steps.run(order)
            else:
                order(worker)


class _NextSteps:
    """Steps whose tokens come from the first rank's device, or were found by this rank itself."""

    def __init__(self, worker: Worker, channel: Channel) -> None:
        self._worker, self._channel = worker, channel
        self._rows: Sequence[NextRow | None] = ()
        self._best = torch.empty(0)

    def run(self, step: NextStep) -> None:
        """Run the step on the rank's part."""
        runner = self._worker.ahead
        if runner is None:
            raise AssertionError("a follower must run ahead where the first rank does")
        rows = step.rows
        if rows is None:
            rows = [row and row._replace(past=row.past + 1) for row in self._rows]
        if step.is_own:
            tokens = self._best[: len(rows), 0]
        else:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=self._worker.model.device)
            self._channel.share(tokens)
        self._rows, self._best = rows, runner.run_ahead(rows, tokens).best
