"""What is taken of a draft: the tokens that plain decoding draws, in their own distribution."""

from dataclasses import dataclass, field

import pytest
import torch

from sevenfold.engine.constraint import Constraint
from sevenfold.engine.request import Request
from sevenfold.engine.sampling import Output, Sampler, SamplingParams
from sevenfold.engine.speculation.acceptance import Walk, walk_drafts
from sevenfold.engine.speculation.tree import DraftTree

VOCAB = 4
CPU = torch.device("cpu")
TREES = {
    "chain": DraftTree((2, 1), (0, 1)),
    "tree": DraftTree((2, 0, 1, 3), (0, 0, 1, 1)),
}


@dataclass
class Taking:
    request: Request
    output: Output
    constraint: Constraint | None = None
    taken: list[int] = field(default_factory=list)

    def accepts(self, token: int) -> bool:
        return True

    def push(self, token: int) -> tuple[str, bool]:
        self.taken.append(token)
        return "", False


def taking(n: int, params: SamplingParams) -> Taking:
    return Taking(Request(str(n), (0,), 9), Output(params, (0,), ()))


def logits_after(guesses: tuple[int, ...]) -> torch.Tensor:
    """A Markov chain: what follows depends on the token before."""
    table = torch.tensor([[0.1, 0.9, -0.4, 0.3], [1.0, 0.0, 0.2, 0.6], [0.0, 1.2, 0.1, -0.9],
                          [0.5, 0.4, 0.3, 0.2]])  # fmt: skip
    return table[guesses[-1] if guesses else 0]


def walks_of(outputs: list[Taking], tree: DraftTree) -> list[Walk]:
    nodes = range(len(tree) + 1)
    after = torch.stack([logits_after(tree.guesses(node)) for node in nodes])
    walks = [Walk(one, tree, n * len(after)) for n, one in enumerate(outputs)]
    walk_drafts(walks, after.repeat(len(outputs), 1), lambda chosen: Sampler(chosen, VOCAB, CPU))
    return walks


@pytest.mark.parametrize("name", TREES)
def test_the_distribution_is_the_models(name: str) -> None:
    """Pairs of the first two tokens, where the first was guessed: chi-square, 1 in 10,000."""
    params = [SamplingParams(max_tokens=9, seed=n, temperature=0.8) for n in range(6000)]
    walks = walks_of([taking(n, p) for n, p in enumerate(params)], TREES[name])
    first = torch.bincount(torch.tensor([w.taken[0].token for w in walks]), minlength=VOCAB)
    assert chi_square(first, (logits_after(()) / 0.8).softmax(-1)) < 21.1  # 3 degrees
    guessed = [w for w in walks if w.taken[0].token == 2]
    assert all(len(w.taken) >= 2 for w in guessed), "the first guess was right"
    second = torch.bincount(torch.tensor([w.taken[1].token for w in guessed]), minlength=VOCAB)
    assert chi_square(second, (logits_after((2,)) / 0.8).softmax(-1)) < 21.1


def chi_square(counts: torch.Tensor, wanted: torch.Tensor) -> float:
    expected = wanted * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", TREES)
def test_every_token_is_the_one_of_its_own_draw(name: str) -> None:
    rules = {"temperature": 0.7, "presence_penalty": 1.5, "repetition_penalty": 1.3}
    params = [SamplingParams(max_tokens=9, seed=n, **rules) for n in range(300)]
    walks = walks_of([taking(n, p) for n, p in enumerate(params)], TREES[name])
    lengths = set()
    for walk, one in zip(walks, params, strict=True):
        plain = Output(one, (0,), ())
        for taken in walk.taken:
            z = logits_after(tuple(plain.tokens))[None]
            plain.tokens.append(int(Sampler([plain], VOCAB, CPU).choose(z)))
            assert taken.token == plain.tokens[-1]
        assert len(walk.path) == len(walk.taken)
        lengths.add(len(walk.taken))
    assert lengths == {1, 2, 3}


def test_logits_that_are_not_finite_end_a_walk_where_they_stand() -> None:
    greedy = SamplingParams(max_tokens=9, temperature=0.0)
    tree = DraftTree((1, 0), (0, 1))
    after = torch.stack([logits_after(()), logits_after((1,)), logits_after((0,))])
    for bad, wanted in ((0, []), (1, [1]), (2, [1, 0])):
        logits = after.clone()
        logits[bad, 3] = float("nan")
        one = taking(0, greedy)
        walk = Walk(one, tree, 0)
        walk_drafts([walk], logits, lambda chosen: Sampler(chosen, VOCAB, CPU))
        assert [taken.token for taken in walk.taken] == one.taken == wanted
        assert walk.is_finite == (bad > 0)
        assert len(walk.path) == max(1, len(wanted))
