"""Greedy tokens are the same whatever the engine does: the product of what it can do, tiny, fp32.

The default run takes a covering array of it, the slow run all. Each case proves that it did what
its name says: see matrix.Run.check_effects.
"""

from dataclasses import astuple
from functools import cache
from itertools import combinations

import pytest
from covering import met
from engine_helpers import tiny_model, uncached
from matrix import (
    AXES,
    CASES,
    NUM_TOKENS,
    QUICK,
    REST,
    STRENGTH,
    TEXTS,
    Case,
    Run,
    engine_of,
    fake_graphs,
    nearly,
    outspoken,
)
from tokenizers import Tokenizer

from sevenfold.models import HybridModel


@cache
def models() -> tuple[HybridModel, HybridModel]:
    """The model, and a smaller one that drafts."""
    model = outspoken(tiny_model("lsf", max_position_embeddings=200))
    return model, nearly(model)


@cache
def wanted() -> list[list[int]]:
    return [uncached(models()[0], text, NUM_TOKENS) for text in TEXTS]


def check(case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = fake_graphs(case, monkeypatch)
    run = Run(case, engine_of(case, *models(), tokenizer))
    run.run()
    for turn in run.turns:
        assert [request.generated for request in turn] == wanted()
    run.check_effects()
    assert (captured.replayed > 0) == (run.engine._worker.ahead is not None) == case.graphs


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_tokens(case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, tokenizer, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", REST, ids=str)
def test_tokens_of_the_rest(
    case: Case, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tokenizer, monkeypatch)


def test_the_quick_cases_meet_all_that_three_axes_can() -> None:
    def all_met(cases: list[Case]) -> set:
        return {one for case in cases for one in met(astuple(case), STRENGTH)}

    assert all_met(QUICK) == all_met(CASES)
    assert not {*QUICK} & {*REST}
    assert {*QUICK, *REST} == {*CASES}
    # Every two values meet but for those that exclude each other.
    pairs = {pair for case in CASES for pair in combinations(enumerate(astuple(case)), 2)}
    every = {
        ((i, a), (j, b))
        for (i, first), (j, second) in combinations(enumerate(AXES), 2)
        for a in first
        for b in second
    }
    assert {f"{AXIS[i]}={a} {AXIS[j]}={b}" for (i, a), (j, b) in every - pairs} == {
        "drafts=chain invariant=True",
        "drafts=tree invariant=True",
        "drafts=model invariant=True",
        "mix=alone memory=preempting",
        "memory=preempting invariant=True",
        "memory=ample host=True",
        "cached=False host=True",
    }


AXIS = list(Case.__dataclass_fields__)
