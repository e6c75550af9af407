"""Paths that requests left last: the next turn of a chat finds its own by comparing tokens.

To hash thousands of blocks and look each of them up takes a millisecond, to compare as many bytes
microseconds. A trail is found by its salt and first block, and tokens are compared to the last
byte; it only names nodes of the tree, and those that have been dropped since do not count.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sevenfold.engine.cache.arena import index_of
from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.cache.tree import Node, PrefixTree

# Shorter paths are as soon hashed.
_LEAST_BLOCKS = 8
# Some 24 MB of the host's memory: 256 + 32 bytes for each block of 64 tokens.
_MOST_TRAILS, _MOST_BLOCKS = 256, 80_000


class Path(NamedTuple):
    """Nodes, first block first, and where their pages lie, if they have any.

    Neither is written to: paths share them, for to copy one touches each of its nodes.
    """

    nodes: list[Node]
    indices: array

    @classmethod
    def empty(cls) -> "Path":
        """Return the path of no blocks."""
        return cls([], array("q"))

    def first(self, num_blocks: int) -> "Path":
        """Return the path of so many first blocks."""
        if num_blocks == len(self.nodes) >= len(self.indices):
            return self
        return Path(self.nodes[:num_blocks], self.indices[:num_blocks])

    def to(self, nodes: Sequence[Node]) -> "Path":
        """Return the path that goes on to further nodes."""
        if not nodes:
            return self
        indices = array("q", [index_of(node.page) for node in nodes if node.page is not None])
        return Path([*self.nodes, *nodes], self.indices + indices)


@dataclass(eq=False, frozen=True, slots=True)
class Trail:
    """A path with the keys of its blocks and their tokens, as KeyChain.packed gives them; start is
    the chain's."""

    start: tuple[bytes, bytes]
    path: Path
    keys: list[bytes]
    tokens: bytes

    def __len__(self) -> int:
        return len(self.keys)


class Trails:
    """The paths that were left last, one for each that is not the beginning of another."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._trails: OrderedDict[bytes, Trail] = OrderedDict()  # by the key of the last block
        self._by_start: dict[tuple[bytes, bytes], dict[bytes, Trail]] = {}
        self._num_blocks = 0

    def __len__(self) -> int:
        return len(self._trails)

    def leave(self, path: Path, chain: KeyChain) -> None:
        """Note the whole path of a request that ends; nothing of it may change any more."""
        nodes, num_blocks = path.nodes, len(path.nodes)
        if not _LEAST_BLOCKS <= num_blocks <= _MOST_BLOCKS:
            return
        start, end = chain.start, nodes[-1].key
        for trail in list(self._by_start.get(start, {}).values()):
            shared = min(len(trail), num_blocks)
            if trail.keys[shared - 1] != nodes[shared - 1].key:
                continue
            if shared == num_blocks and self._tree.holds(trail.path.nodes[shared - 1]):
                self._trails.move_to_end(trail.keys[-1])
                return
            self._drop(trail)
        keys, tokens = chain.keys(num_blocks), chain.packed(num_blocks)
        trail = Trail(start, path.first(num_blocks), keys, tokens)
        self._trails[end] = self._by_start.setdefault(start, {})[end] = trail
        self._num_blocks += num_blocks
        while len(self._trails) > _MOST_TRAILS or self._num_blocks > _MOST_BLOCKS:
            self._drop(next(iter(self._trails.values())))

    def along(self, chain: KeyChain, most_blocks: int) -> Path:
        """Return the longest path that a trail has in common with a request, at most so long.

        The keys of its blocks are the chain's from now on.
        """
        if most_blocks < _LEAST_BLOCKS:
            return Path.empty()
        # Most often it is the one that was left last.
        trails = list(self._by_start.get(chain.start, {}).values())[::-1]
        best, which = chain.closest([trail.tokens for trail in trails], most_blocks)
        if not best:
            return Path.empty()
        found = trails[which]
        self._trails.move_to_end(found.keys[-1])
        chain.adopt(found.keys, best)
        while best and not self._tree.holds(found.path.nodes[best - 1]):
            best -= 1
        return found.path.first(best)

    def clear(self) -> None:
        """Forget all of them."""
        self._trails.clear()
        self._by_start.clear()
        self._num_blocks = 0

    def _drop(self, trail: Trail) -> None:
        start, end = trail.start, trail.keys[-1]
        del self._trails[end], self._by_start[start][end]
        if not self._by_start[start]:
            del self._by_start[start]
        self._num_blocks -= len(trail)
