"""A draft: guesses of the tokens that follow, as a tree whose root is the last known token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

ROOT = 0


@dataclass(frozen=True)
class DraftTree:
    """Guesses in nodes 1, 2, ...; node 0, the root, is a token that is known.

    tokens: of node 1, of node 2, ...
    parents: of node 1, of node 2, ...; a parent's number is less than its child's.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def merged(cls, paths: Sequence[Sequence[int]], most: int) -> "DraftTree":
        """Join continuations, which share what they begin with, up to a number of guesses.

        Guesses of one depth come before deeper ones, those of earlier paths first.
        """
        if len(paths) == 1:
            chain = tuple(paths[0][:most])
            return cls(chain, tuple(range(len(chain))))
        parents, children = [], {}
        at = [ROOT] * len(paths)
        for guesses in zip_longest(*paths):
            for n, token in enumerate(guesses):
                if token is None:
                    continue
                key = (at[n], token)
                if key not in children:
                    if len(children) == most:
                        return cls(tuple(token for _, token in children), tuple(parents))
                    parents.append(at[n])
                    children[key] = len(parents)
                at[n] = children[key]
        return cls(tuple(token for _, token in children), tuple(parents))

    def first(self, num_guesses: int) -> "DraftTree":
        """The tree of its first guesses."""
        return DraftTree(self.tokens[:num_guesses], self.parents[:num_guesses])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every guess follows the one before it."""
        return all(parent == node for node, parent in enumerate(self.parents))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of every node; the root's is 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Of every node, the nodes from the root to itself."""
        paths: list[tuple[int, ...]] = [(ROOT,)]
        for node, parent in enumerate(self.parents, start=1):
            paths.append((*paths[parent], node))
        return tuple(paths)

    def child(self, node: int, token: int) -> int | None:
        """Return the node that guesses a token after another node, or None."""
        for other, parent in enumerate(self.parents, start=1):
            if parent == node and self.tokens[other - 1] == token:
                return other
        return None

    def guesses(self, node: int) -> tuple[int, ...]:
        """The tokens on the way to a node, the root's apart."""
        return tuple(self.tokens[n - 1] for n in self.paths[node][1:])
