"""How far a draft is right: each place's own token is chosen, and compared with the guesses.

A place's token depends on its logits, on the tokens before it and on the request's draw for that
place, as in plain decoding; so what comes out is what plain decoding gives, whatever was guessed.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from sevenfold.engine.constraint import Constraint, mask_logits
from sevenfold.engine.request import Request
from sevenfold.engine.sampling import Logprobs, Output, Sampler, read_logprobs
from sevenfold.engine.speculation.tree import ROOT, DraftTree
from sevenfold.engine.transfer import Arriving, upload


class Taken(NamedTuple):
    """A token that was chosen, the text that it completed, and its log probabilities if asked."""

    token: int
    text: str
    logprobs: Logprobs | None


class Progress(Protocol):
    """An output that takes one token after another."""

    @property
    def request(self) -> Request:
        """Whose it is."""
        ...

    @property
    def output(self) -> Output:
        """The sampler's view of it, as it was before the draft."""
        ...

    @property
    def constraint(self) -> Constraint | None:
        """Which tokens may come next."""
        ...

    def accepts(self, token: int) -> bool:
        """Advance the grammar; False if the token may not follow."""
        ...

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token: the text that may be shown now, and whether the output ends here."""
        ...


@dataclass
class Walk:
    """One draft on its way from the root: the nodes that were right, and the tokens after each.

    first: the row of the root's logits.
    path: nodes whose tokens are known to be right, the root first.
    taken: what was chosen after each node of the path.
    stopped: whether the output ends with the last of them.
    is_finite: False if the root's logits are not, and then nothing is taken.
    is_refused: whether the grammar refuses the token after the root, and nothing is taken.
    """

    progress: Progress
    tree: DraftTree
    first: int
    path: list[int] = field(default_factory=lambda: [ROOT])
    taken: list[Taken] = field(default_factory=list)
    stopped: bool = False
    is_finite: bool = True
    is_refused: bool = False
    is_over: bool = False

    @property
    def request(self) -> Request:
        """Whose draft it is."""
        return self.progress.request

    @property
    def nodes(self) -> Sequence[int]:
        """Nodes after which a token is to be chosen next: all, where nothing hangs on the walk."""
        if self.progress.constraint is None:
            return range(len(self.tree) + 1)
        return self.path[-1:]

    def advance(self, token: int, logprobs: Logprobs | None, *, is_finite: bool) -> None:
        """Take the token after the path's last node, and go on to the node that guessed it."""
        if not is_finite or not self.progress.accepts(token):
            # Behind the root it is no fault yet: the next step begins there.
            if self.taken:
                self.path.pop()
            else:
                self.is_finite, self.is_refused = is_finite, is_finite
            self.is_over = True
            return
        text, self.stopped = self.progress.push(token)
        self.taken.append(Taken(token, text, logprobs))
        node = self.tree.child(self.path[-1], token)
        if self.stopped or node is None:
            self.is_over = True
        else:
            self.path.append(node)


def walk_drafts(
    walks: Sequence[Walk], logits: Tensor, new_sampler: Callable[[list[Output]], Sampler]
) -> None:
    """Walk every draft to where it is wrong, or to its end.

    Args:
        walks: none has begun.
        logits: [tokens, vocab_size] fp32 after every node of every tree, one after another.
        new_sampler: builds the sampler of some outputs.
    """
    while going := [walk for walk in walks if not walk.is_over]:
        chosen = _choose(going, logits, new_sampler)
        for walk in going:
            while not walk.is_over and (node := walk.first + walk.path[-1]) in chosen:
                token, logprobs, is_finite = chosen[node]
                walk.advance(token, logprobs, is_finite=is_finite)


def _choose(
    walks: Sequence[Walk], logits: Tensor, new_sampler: Callable[[list[Output]], Sampler]
) -> dict[int, tuple[int, Logprobs | None, bool]]:
    """Choose the tokens after the nodes that the walks name, by one wait for the device.

    Row of the logits -> token, its log probabilities, whether the row is finite.
    """
    asked = [(walk, node) for walk in walks for node in walk.nodes]
    rows = [walk.first + node for walk, node in asked]
    outputs = [_supposed(walk.progress.output, walk.tree.guesses(node)) for walk, node in asked]
    picked = _picked(logits, rows)
    masked = mask_logits(picked, [walk.progress.constraint for walk, _ in asked])
    checked = new_sampler(outputs).choose_checked(masked, picked)
    arriving = Arriving(checked)
    logprobs = read_logprobs(picked, checked[:, 0], [output.params.logprobs for output in outputs])
    ids, finite = arriving.numbers()
    return dict(zip(rows, zip(ids, logprobs, map(bool, finite), strict=True), strict=True))


def _picked(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of the logits; those that lie side by side, as one draft's do, where they lie."""
    if rows[-1] - rows[0] + 1 == len(rows):  # they rise
        return logits[rows[0] : rows[-1] + 1]
    return logits[upload(rows, logits.device)]


def _supposed(output: Output, guesses: Sequence[int]) -> Output:
    """The output as it would be if the guesses on the way to a node were right."""
    supposed = copy(output)
    supposed.tokens = [*output.tokens, *guesses]
    return supposed
