"""The next decoding step, begun before the tokens of the last one are on the host.

    host    take n-1, plan n, launch n+1 | take n, plan n+1, launch n+2 | ...
    device  n                            | n+1                          | ...

A decoding step changes nothing that another request owns, and all work is in the order of one
stream. So a row whose request ends, is preempted or fails meanwhile has only spent time: its token
is dropped, and whoever gets its memory has it cleared or filled behind that row. What it wrote was
one key past the tokens that are recorded, which no prefix holds, and a state that is given back.
Snapshots are written once the scheduler has planned the step, before the state advances again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sevenfold.engine.cache import CacheManager
from sevenfold.engine.request import Request
from sevenfold.engine.rows import NextRow
from sevenfold.engine.sampling import Logprobs, Sampler
from sevenfold.engine.scheduler import DecodeRow, Scheduler
from sevenfold.engine.transfer import Arriving
from sevenfold.engine.worker import Worker

Requests = tuple[Request | None, ...]


@dataclass(frozen=True)
class Chosen:
    """The tokens that a run gave, on their way to the host.

    requests: one for each row; None where nobody reads it.
    sampler: chose them, and goes on from there.
    tokens: [N] int64, on the device.
    arriving: token ids, and whether the logits were finite.
    logprobs: of each row that asks for them.
    """

    requests: Requests
    sampler: Sampler
    tokens: Tensor
    arriving: Arriving
    logprobs: list[Logprobs | None]


class Ahead:
    """Runs the decoding step that is to come, and hands it over when the scheduler has planned it.

    chosen: that step, if it is under way.
    """

    def __init__(self, worker: Worker, cache: CacheManager, scheduler: Scheduler) -> None:
        self._worker, self._cache, self._scheduler = worker, cache, scheduler
        self.chosen: Chosen | None = None

    def take(self, rows: Sequence[DecodeRow]) -> Chosen | None:
        """Return the step under way, now that it is planned: of the planned rows, and once.

        Writes the snapshots that the plan asks for.
        """
        chosen = self.chosen
        self.forget()
        if chosen is None or not rows:
            return None
        planned = {row.request for row in rows}
        requests = tuple(request if request in planned else None for request in chosen.requests)
        if len(planned) + requests.count(None) != len(requests):
            raise AssertionError("a step that is under way must hold every row that is planned")
        self._snapshot(rows)
        return replace(chosen, requests=requests)

    def launch(self, chosen: Chosen) -> tuple[Requests, Tensor] | None:
        """Run the step after one whose tokens are chosen, if there is one and memory has its place.

        A request that has come to max_tokens leaves its row to nobody, as long as a step without
        that row would be as large.

        Returns:
            Requests [N], None for rows that are nobody's, and logits [N, vocab_size]; None if
            nothing runs.
        """
        runner = self._worker.ahead
        requests = tuple(r if r and r.num_remaining_tokens > 1 else None for r in chosen.requests)
        going = [request for request in requests if request is not None]
        if runner is None or not going:
            return None
        if runner.num_step_rows(len(going)) != runner.num_step_rows(len(requests)):
            return None
        # The last token counts as computed, as it will be, and this is the one behind it.
        if not all(self._scheduler.reserve(r, r.num_computed_tokens + 2) for r in going):
            return None
        self._worker.prepare(self._cache.take_fresh())
        rows = [None if request is None else self._row(request) for request in requests]
        return requests, runner.run_ahead(rows, chosen.tokens)

    def forget(self) -> None:
        """Drop the step under way; what it computes is nobody's."""
        self.chosen = None

    def _row(self, request: Request) -> NextRow:
        past = request.num_computed_tokens + 1
        return NextRow(past, self._cache.state(request), self._cache.pages(request))

    def _snapshot(self, rows: Sequence[DecodeRow]) -> None:
        kept = []
        for row in rows:
            if row.snapshots:
                placement = self._cache.placement(row.request)
                kept += [(placement.state, placement.snapshots[at]) for at in row.snapshots]
        self._worker.snapshot([s for s, _ in kept if s is not None], [at for _, at in kept])
