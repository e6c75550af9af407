"""Draft trees: continuations joined, cut and walked."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.speculation.tree import ROOT, DraftTree

PATHS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=4)


def test_continuations_share_what_they_begin_with() -> None:
    tree = DraftTree.merged([[5, 6, 7], [5, 8], [9]], most=10)
    assert (tree.tokens, tree.parents) == ((5, 9, 6, 8, 7), (0, 0, 1, 1, 3))
    assert tree.depths == (0, 1, 1, 2, 2, 3)
    assert tree.paths[5] == (0, 1, 3, 5)
    assert tree.guesses(5) == (5, 6, 7)
    assert (tree.child(ROOT, 9), tree.child(1, 8), tree.child(1, 9)) == (2, 4, None)
    assert not tree.is_chain
    assert tree.first(1).is_chain


@settings(max_examples=60, deadline=None)
@given(paths=PATHS, most=st.integers(0, 12), cut=st.integers(0, 12))
def test_a_tree_holds_its_paths_and_nothing_else(
    paths: list[list[int]], most: int, cut: int
) -> None:
    tree = DraftTree.merged(paths, most)
    beginnings = {tuple(path[: n + 1]) for path in paths for n in range(len(path))}
    held = [tree.guesses(node) for node in range(1, len(tree) + 1)]
    assert len(held) == len(set(held)) == min(most, len(beginnings))
    assert set(held) <= beginnings
    assert [len(one) for one in held] == sorted(len(one) for one in held)
    part = tree.first(cut)
    assert all(parent < node for node, parent in enumerate(part.parents, start=1))
    assert len(part) == min(cut, len(tree))
    assert part.is_chain == (len({len(one) for one in held[:cut]}) == len(part))
