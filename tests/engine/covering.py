"""Covering arrays: few cases in which every combination of a few axes' values is met."""

from collections.abc import Hashable, Sequence
from itertools import combinations

Values = tuple[Hashable, ...]
Met = frozenset[tuple[tuple[int, Hashable], ...]]


def met(case: Values, strength: int) -> Met:
    """Every combination of so many axes with the values that a case gives them."""
    return frozenset(combinations(tuple(enumerate(case)), strength))


def covering(cases: Sequence[Values], strength: int) -> list[Values]:
    """Choose cases that together meet each combination that any case meets.

    Greedy: always the case that meets most of what is left, of equal ones the first.
    """
    meets = [met(case, strength) for case in cases]
    left, chosen = set().union(*meets), []
    while left:
        best = max(range(len(cases)), key=lambda n: len(meets[n] & left))
        chosen.append(cases[best])
        left -= meets[best]
    return chosen
