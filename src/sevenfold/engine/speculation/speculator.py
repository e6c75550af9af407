"""Which requests get drafts in a step, and what became of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sevenfold.engine.request import Request, Status
from sevenfold.engine.rows import Row
from sevenfold.engine.sampling import Output, Sampler
from sevenfold.engine.scheduler import PrefillChunk
from sevenfold.engine.speculation.acceptance import Progress, Walk, walk_drafts
from sevenfold.engine.speculation.config import SpeculationConfig
from sevenfold.engine.speculation.drafter import Ask, Drafter
from sevenfold.engine.speculation.pace import GAIN_WEIGHT, Allowance, Pace, StepTimes
from sevenfold.engine.speculation.shadow import Shadow
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import Checked, DraftRow

_NOTHING = DraftTree((), ())
# Requests whose guesses are looked up in a step only to see whether they are right: 20 us each.
_MOST_LOOKED_UP = 4


@dataclass
class SpeculationCounters:
    """What speculation has done since the engine began.

    num_drafts: drafts that were checked; num_drafted_tokens: guesses in them;
    num_accepted_tokens: guesses that were right, each a token without a step of its own.
    num_spoilt_drafts: drafts whose first logits were not finite; their rows went without.
    """

    num_drafts: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_spoilt_drafts: int = 0


class Checker(Protocol):
    """What runs the model on drafts."""

    def check(self, drafts: Sequence[DraftRow]) -> Checked:
        """Run drafts of several requests from the states before them."""
        ...

    def accept(
        self,
        accepted: Sequence[tuple[DraftRow, Sequence[int]]],
        *,
        rejected: Sequence[DraftRow],
    ) -> None:
        """Take the nodes that were right, root to last; clear drafts that are not finite."""
        ...


class Drafted(NamedTuple):
    """A request whose guesses are to be checked.

    row: its last known token, with pages for the guesses and the snapshots due on the way.
    num_guesses: those that it has room for.
    """

    progress: Progress
    row: Row
    num_guesses: int


@dataclass
class _Drafting:
    """A request that decodes: its pace, its guesses for this step, and those that are watched."""

    pace: Pace = field(default_factory=Pace)
    tree: DraftTree = _NOTHING
    shadow: Shadow | None = None


class Speculator:
    """Guesses for those requests whose drafts pay, and checks the guesses."""

    def __init__(
        self,
        config: SpeculationConfig,
        drafter: Drafter,
        worker: Checker,
        new_sampler: Callable[[Sequence[Output]], Sampler],
    ) -> None:
        """Begin with nothing drafted.

        Args:
            config: what it may do.
            drafter: guesses.
            worker: runs the model.
            new_sampler: builds the sampler of some outputs.
        """
        self._config, self._drafter = config, drafter
        self._worker, self._new_sampler = worker, new_sampler
        self._times, self._allowance = StepTimes(), Allowance()
        self._typical_gain = 1.0  # of the drafts of all requests
        self._num_looked_up = 0
        self._owes = False  # whether a step that is not ahead is so for a guess's sake
        self._drafting_s, self._num_decoding = 0.0, 0  # of the last call of propose
        self._drafted: dict[str, _Drafting] = {}
        self._to_watch: Sequence[tuple[Request, Output]] = ()  # until the step is launched
        self.counters = SpeculationCounters()

    def propose(
        self, decoding: Sequence[tuple[Request, Output]], *, is_under_way: bool = False
    ) -> bool:
        """Guess what follows, and ask the scheduler for room: draft_tokens of each request.

        Args:
            decoding: the requests that may have a decode row in the next step.
            is_under_way: whether that step runs already: then guesses can be checked in the one
                behind it, and none is asked for.

        Returns:
            Whether there is a guess, or will be.
        """
        self._drafting_s, self._num_decoding = 0.0, len(decoding)
        for request, _ in decoding:
            request.draft_tokens = 0
        if self.watches:
            self._follow(decoding)
        asks = self._wanted(decoding)
        if is_under_way:
            holds = bool(asks) and self._would_draft(asks)
        else:
            holds = bool(asks) and self._draft(asks)
        self._to_watch = decoding if self.watches else ()
        self._owes |= holds
        return holds

    def warm_up(self, stopped: Callable[[], bool]) -> None:
        """Do what happens once, on a GPU, before a request waits for it, until it is stopped."""
        self._drafter.warm_up(stopped)

    def read(self, decoding: Sequence[Request], chunks: Sequence[PrefillChunk]) -> None:
        """Look at more of the prompts of a step, and for guesses to watch, while the device
        computes it: before its tokens are recorded."""
        requests = [*decoding, *(chunk.request for chunk in chunks)]
        self._drafter.read(requests, sum(chunk.end - chunk.first for chunk in chunks))
        self._watch()

    def check(self, drafted: Sequence[Drafted], decoding: Sequence[Request]) -> list[Walk]:
        """Check the drafts of some requests, one or more, in one run of the model.

        Args:
            drafted: the requests.
            decoding: all that decode in this step, with a draft or without.

        Returns:
            How far each draft is right; what was taken is not recorded yet.
        """
        drafts = [
            DraftRow.of(one.row, self._of(one.progress.request).tree.first(one.num_guesses))
            for one in drafted
        ]
        logits, starts = self._worker.check(drafts)
        self.read(decoding, ())
        walks = [
            Walk(one.progress, draft.tree, first)
            for one, draft, first in zip(drafted, drafts, starts, strict=True)
        ]
        walk_drafts(walks, logits, self._new_sampler)
        pairs = list(zip(drafts, walks, strict=True))
        self._worker.accept(
            [(draft, walk.path) for draft, walk in pairs if walk.taken],
            rejected=[draft for draft, walk in pairs if not walk.is_finite],
        )
        for walk in walks:
            self._count(walk, len(decoding))
        return walks

    def note_plain(self, num_rows: int, seconds: float | None, *, is_steady: bool) -> None:
        """Note a step without drafts.

        Args:
            num_rows: that decoded.
            seconds: that it took, guessing before it included; None if not for them alone.
            is_steady: whether it and the next one were begun ahead, where they can be.
        """
        if self._drafting_s:
            # Guesses that came to nothing, or a prompt that a smaller model caught up with.
            self._allowance.spend(self._times.note_failed(self._num_decoding, self._drafting_s))
        if not num_rows:
            return
        seconds = None if seconds is None else seconds - self._drafting_s
        if seconds is not None and is_steady:
            self._times.note_plain(num_rows, seconds)
            self._owes = False
        elif seconds is not None and self._owes:
            # The device stood still between a draft and steps ahead of the host.
            steps = self._times.in_steps(num_rows, seconds)
            self._allowance.spend(0.0 if steps is None else max(0.0, steps - 1))
        self._allowance.earn()

    def note_drafted(self, walks: Sequence[Walk], num_rows: int, seconds: float) -> None:
        """Note a step of so many rows with drafts: it took what it took for what was accepted."""
        most = max(len(walk.tree) for walk in walks)
        steps = self._times.note_drafted(num_rows, most, seconds)
        if steps is None:
            steps = self._times.cost(num_rows, most)
        saved = sum(len(walk.path) - 1 for walk in walks) / num_rows
        self._allowance.spend(steps - 1 - saved)
        self._allowance.earn()

    def forget(self, preempted: Sequence[Request], ended: Sequence[Request]) -> None:
        """Give up what is kept for requests; the pace of one that comes back is kept."""
        for request in (*preempted, *ended):
            self._drafter.forget(request.id)
        for request in ended:
            self._drafted.pop(request.id, None)

    def _count(self, walk: Walk, num_rows: int) -> None:
        """Note what became of a draft."""
        request, num_accepted = walk.request, len(walk.path) - 1
        self.counters.num_drafts += 1
        self.counters.num_drafted_tokens += len(walk.tree)
        self.counters.num_accepted_tokens += num_accepted
        self.counters.num_spoilt_drafts += not walk.is_finite
        request.num_drafted_tokens += len(walk.tree)
        request.num_accepted_tokens += num_accepted
        if self._config.adaptive:
            drafting, cost = self._of(request), self._times.cost(num_rows, len(walk.tree))
            drafting.pace.follow(num_accepted)
            is_whole = walk.path[-1] not in walk.tree.parents
            drafting.pace.observe(num_accepted, is_whole=is_whole)
            drafting.pace.judge(paid=1 + num_accepted >= cost)
            self._typical_gain += GAIN_WEIGHT * (num_accepted - self._typical_gain)

    @property
    def watches(self) -> bool:
        """Whether guesses are followed that nothing checks."""
        return self._config.adaptive and self._drafter.is_free

    def _follow(self, decoding: Sequence[tuple[Request, Output]]) -> None:
        """Compare guesses with the tokens that have come."""
        for request, _ in decoding:
            drafting = self._of(request)
            if drafting.shadow is not None:
                drafting.shadow.follow(request.generated, drafting.pace)
                if drafting.shadow.is_over:
                    drafting.shadow = None

    def _watch(self) -> None:
        """Guess for some requests without a draft, to see whether it will be right."""
        decoding, self._to_watch = self._to_watch, ()
        idle = [
            (request, output)
            for request, output in decoding
            if not request.draft_tokens
            and request.status is Status.DECODING  # nor given up meanwhile
            and self._of(request).shadow is None
        ]
        if not idle:
            return
        # In turn, where there are more.
        first, most = self._num_looked_up % len(idle), self._config.draft_tokens
        asks = [
            Ask(request, output, min(most, request.num_remaining_tokens), self._config.branches)
            for request, output in [*idle[first:], *idle[:first]][:_MOST_LOOKED_UP]
        ]
        self._num_looked_up += len(asks)
        for ask, paths in zip(asks, self._drafter.propose(asks), strict=True):
            if paths:
                tree = DraftTree.merged(paths, most)
                self._of(ask.request).shadow = Shadow(tree, len(ask.request.generated))

    def _wanted(self, decoding: Sequence[tuple[Request, Output]]) -> list[Ask]:
        """The requests to guess for: all, or those whose drafts should pay, or one to try."""
        if not self._config.adaptive:
            return self._asks(decoding)
        num_rows = len(decoding)
        if not self._allowance.allows or self._times.wants_plain(num_rows):
            return []
        paces = [self._of(request).pace for request, _ in decoding]
        promising = [one for one, pace in zip(decoding, paces, strict=True) if pace.expected > 0]
        asks = self._asks(promising)
        if asks and self._pays(asks, num_rows):
            return asks
        if not self._allowance.allows_try:
            return []
        tried = [one for one, pace in zip(decoding, paces, strict=True) if self._may_try(pace)]
        return self._asks(tried)[:1]

    def _may_try(self, pace: Pace) -> bool:
        """Whether a draft may show that the cost is less than what was measured, or the gain more.

        Guesses that are watched show the gain by themselves.
        """
        return not self.watches or pace.run >= self._config.draft_tokens

    def _pays(self, asks: Sequence[Ask], num_rows: int) -> bool:
        """Whether a step with drafts should give more tokens in its time than one without."""
        expected = [self._of(ask.request).pace.expected for ask in asks]
        gain = sum(min(x, ask.num_tokens) for x, ask in zip(expected, asks, strict=True))
        most = max(self._most_guesses(ask) for ask in asks)
        return 1 + gain / num_rows >= self._times.cost(num_rows, most)

    def _would_draft(self, asks: Sequence[Ask]) -> bool:
        """Whether to hold the step behind one that runs: for guesses, if looking costs nothing."""
        if self._drafter.is_free and not self._config.adaptive:
            return any(self._drafter.propose(asks))
        return True

    def _draft(self, asks: Sequence[Ask]) -> bool:
        """Guess, and ask the scheduler for room; returns whether there is a guess."""
        began_s = time.perf_counter()
        proposed = self._drafter.propose(asks)
        self._drafting_s = time.perf_counter() - began_s
        for ask, paths in zip(asks, proposed, strict=True):
            drafting = self._of(ask.request)
            drafting.tree = DraftTree.merged(paths, self._most_guesses(ask))
            ask.request.draft_tokens = len(drafting.tree)
            if drafting.tree:
                drafting.shadow = None
        return any(ask.request.draft_tokens for ask in asks)

    def _most_guesses(self, ask: Ask) -> int:
        most = min(ask.num_tokens * ask.num_branches, self._config.draft_tokens)
        return min(most, ask.request.num_remaining_tokens - 1)

    def _asks(self, decoding: Sequence[tuple[Request, Output]]) -> list[Ask]:
        """What to ask of the drafter for each request that may have a guess."""
        config, most, asks = self._config, self._config.draft_tokens, []
        for request, output in decoding:
            if config.adaptive:
                most = self._of(request).pace.num_draft_tokens(config.draft_tokens)
            num_tokens = min(most, request.num_remaining_tokens - 1)
            if num_tokens > 0:
                asks.append(Ask(request, output, num_tokens, config.branches))
        return asks

    def _of(self, request: Request) -> _Drafting:
        if request.id not in self._drafted:
            # What can be watched is trusted once it was right; a smaller model as those before.
            gain = 0.0 if self.watches else self._typical_gain
            self._drafted[request.id] = _Drafting(Pace(gain))
        return self._drafted[request.id]
