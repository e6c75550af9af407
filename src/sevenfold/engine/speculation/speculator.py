"""Which requests get drafts in a step, and what became of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sevenfold.engine.request import Request
from sevenfold.engine.rows import Row
from sevenfold.engine.sampling import Output, Sampler
from sevenfold.engine.speculation.acceptance import Progress, Walk, walk_drafts
from sevenfold.engine.speculation.config import SpeculationConfig
from sevenfold.engine.speculation.drafter import Ask, Drafter
from sevenfold.engine.speculation.pace import Pace, StepTimes
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.engine.speculation.verifier import Checked, DraftRow

_NOTHING = DraftTree((), ())


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
    """A request that decodes: its pace, and its guesses for this step."""

    pace: Pace = field(default_factory=Pace)
    tree: DraftTree = _NOTHING


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
        self._times = StepTimes()
        self._drafted: dict[str, _Drafting] = {}
        self.counters = SpeculationCounters()

    def propose(self, decoding: Sequence[tuple[Request, Output]]) -> bool:
        """Guess what follows, and ask the scheduler for room: draft_tokens of each request.

        Args:
            decoding: the requests that may have a decode row in the next step.

        Returns:
            Whether there is a guess.
        """
        for request, _ in decoding:
            request.draft_tokens = 0
        if self._config.adaptive and self._times.wants_plain(len(decoding)):
            return False
        asks = [ask for request, output in decoding if (ask := self._ask(request, output))]
        if not asks:
            return False
        for ask, paths in zip(asks, self._drafter.propose(asks), strict=True):
            most = min(ask.num_tokens * ask.num_branches, self._config.draft_tokens)
            most = min(most, ask.request.num_remaining_tokens - 1)
            tree = DraftTree.merged(paths, most)
            self._of(ask.request).tree = tree
            ask.request.draft_tokens = len(tree)
        return any(ask.request.draft_tokens for ask in asks)

    def check(self, drafted: Sequence[Drafted], num_rows: int) -> list[Walk]:
        """Check the drafts of some requests, one or more, in one run of the model.

        Args:
            drafted: the requests.
            num_rows: those that decode in this step, with a draft or without.

        Returns:
            How far each draft is right; what was taken is not recorded yet.
        """
        drafts = [
            DraftRow.of(one.row, self._of(one.progress.request).tree.first(one.num_guesses))
            for one in drafted
        ]
        logits, starts = self._worker.check(drafts)
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
            self._count(walk, num_rows)
        return walks

    def note_step(
        self, decoded: Sequence[Request], plain: Sequence[Request], seconds: float | None
    ) -> None:
        """Note how long the decode rows of a step took, and which of them had no draft.

        None stands for a time that is not theirs alone.
        """
        if decoded and seconds is not None:
            drafted = len(plain) < len(decoded)
            self._times.note(len(decoded), seconds, drafted=drafted)
        for request in plain:
            self._of(request).pace.rest(1)

    def forget(self, requests: Sequence[Request], *, ended: bool) -> None:
        """Give up what is kept for requests; the pace of one that comes back is kept."""
        for request in requests:
            self._drafter.forget(request.id)
            if ended:
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
            self._of(request).pace.observe(num_accepted, self._times.cost(num_rows))

    def _ask(self, request: Request, output: Output) -> Ask | None:
        config, most = self._config, self._config.draft_tokens
        if config.adaptive:
            most = self._of(request).pace.num_draft_tokens(most)
        num_tokens = min(most, request.num_remaining_tokens - 1)
        return Ask(request, output, num_tokens, config.branches) if num_tokens > 0 else None

    def _of(self, request: Request) -> _Drafting:
        return self._drafted.setdefault(request.id, _Drafting())
