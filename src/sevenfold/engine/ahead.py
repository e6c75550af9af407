"""The next decoding step, begun before the tokens of the last one are on the host.

    host    take n-1, plan n, launch n+1 | take n, plan n+1, launch n+2 | ...
    device  n                            | n+1                          | ...

A decoding step changes nothing that another request owns, and all work is in the order of one
stream. So a row whose request ends, is preempted or fails meanwhile has only spent time: its token
is dropped, and whoever gets its memory has it cleared or filled behind that row. What it wrote was
one key past the tokens that are recorded, which no prefix holds, and a state that is given back.
Snapshots are written once the scheduler has planned the step, before the state advances again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.engine.cache import CacheManager
from sevenfold.engine.device import Stepped
from sevenfold.engine.request import Request
from sevenfold.engine.rows import NextRow
from sevenfold.engine.sampling import Logprobs, Sampler
from sevenfold.engine.scheduler import DecodeRow, Scheduler
from sevenfold.engine.transfer import Arriving, upload
from sevenfold.engine.worker import RunsAhead, Worker

Requests = tuple[Request | None, ...]
NewSampler = Callable[[Sequence[Request]], Sampler]


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

    def kept(self) -> "Chosen":
        """Return it with tokens of its own: a prompt's chunk of one token is a decoding step, too,
        and may put its token where these lie."""
        return replace(self, tokens=self.tokens.clone())


class Begun(NamedTuple):
    """A decoding step that runs: its rows, what chooses their tokens, and what it computes."""

    requests: Requests
    sampler: Sampler
    stepped: Stepped


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

    def launch(self, parts: Sequence[Chosen], new_sampler: NewSampler) -> Begun | None:
        """Run the decoding step after runs whose tokens are chosen, if memory has its places.

        Args:
            parts: the runs of the last step, one or more, that chose tokens.
            new_sampler: of requests, by the tokens of theirs that are recorded.

        Returns:
            The rows that run, and what they give; None if nothing runs.
        """
        runner = self._worker.ahead
        going = [r for chosen in parts for r in chosen.requests if r and _goes_on(r)]
        if runner is None or not going:
            return None
        # The last token counts as known, as it will be, and this is the one behind it.
        if not all(self._scheduler.reserve(r, r.num_tokens + 1) for r in going):
            return None
        self._worker.prepare(self._cache.take_fresh())
        if len(parts) == 1 and self._stays(runner, parts[0], len(going)):
            requests = tuple(r if r and _goes_on(r) else None for r in parts[0].requests)
            tokens, sampler = parts[0].tokens, parts[0].sampler
        else:
            requests = tuple(self._scheduler.in_order(going))
            tokens = _tokens_of(requests, parts)
            sampler = new_sampler(requests)
            sampler.follow(tokens)
        rows = [None if request is None else self._row(request) for request in requests]
        return Begun(requests, sampler, runner.run_ahead(rows, tokens))

    def forget(self) -> None:
        """Drop the step under way; what it computes is nobody's."""
        self.chosen = None

    @staticmethod
    def _stays(runner: RunsAhead, chosen: Chosen, num_going: int) -> bool:
        """Whether a step keeps its rows and its sampler: no smaller one will do.

        Rows of requests that have ended are nobody's then.
        """
        return runner.num_step_rows(num_going) == runner.num_step_rows(len(chosen.requests))

    def _row(self, request: Request) -> NextRow:
        state, pages = self._cache.state(request), self._cache.pages(request)
        return NextRow(request.num_tokens, state, pages)

    def _snapshot(self, rows: Sequence[DecodeRow]) -> None:
        kept = []
        for row in rows:
            if row.snapshots:
                placement = self._cache.placement(row.request)
                kept += [(placement.state, placement.snapshots[at]) for at in row.snapshots]
        self._worker.snapshot([s for s, _ in kept if s is not None], [at for _, at in kept])


def _goes_on(request: Request) -> bool:
    """Whether a request may have a token after the one that is on its way."""
    return request.num_remaining_tokens > 1


def _tokens_of(requests: Sequence[Request | None], parts: Sequence[Chosen]) -> Tensor:
    """The requests' tokens [N], where they lie among those of several runs."""
    everyone = [request for chosen in parts for request in chosen.requests]
    place = {request: n for n, request in enumerate(everyone)}
    tokens = torch.cat([chosen.tokens for chosen in parts])
    return tokens[upload([place[request] for request in requests], tokens.device)]
