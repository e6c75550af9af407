"""Finding the longest prefix that a request need not compute, and why there is none."""

from collections import OrderedDict
from enum import Enum
from typing import NamedTuple

from sevenfold.engine.cache.keys import KeyChain
from sevenfold.engine.cache.trails import Path, Trails
from sevenfold.engine.cache.tree import Node, PrefixTree

SEEN_KEYS = 1 << 17


class MissReason(Enum):
    """Why a request found nothing to go on from.

    TOO_SHORT: it has too few tokens. NO_KV: nobody has sent its first block. OTHER_SALT: only
    callers under another salt have. NO_STATE: its blocks are here, but no snapshot on them.
    EVICTED: they were here, and have been dropped. NO_MEMORY: it found some, which had to make room
    for it.
    """

    TOO_SHORT = "too_short"
    NO_KV = "no_kv"
    OTHER_SALT = "other_salt"
    NO_STATE = "no_state"
    EVICTED = "evicted"
    NO_MEMORY = "no_memory"


class Lookup(NamedTuple):
    """What a request found: seen_tokens are those that it has in common with an earlier one.

    reason: for the operator; a caller must get public_reason, since OTHER_SALT tells what other
    callers sent.
    """

    hit_tokens: int
    seen_tokens: int
    reason: MissReason | None

    @property
    def public_reason(self) -> MissReason | None:
        """The reason as the request's own caller may know it."""
        return MissReason.NO_KV if self.reason is MissReason.OTHER_SALT else self.reason


class SeenKeys:
    """Keys of blocks that are no longer cached, the latest of them: where paths branch."""

    def __init__(self, capacity: int = SEEN_KEYS) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = capacity

    def add(self, key: bytes) -> None:
        """Note a key."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys


class Match(NamedTuple):
    """A lookup and the path that it goes on from."""

    lookup: Lookup
    path: Path

    def without_path(self) -> "Match":
        """Return the match of a request for which nothing of what it found can be kept."""
        return Match(Lookup(0, self.lookup.seen_tokens, MissReason.NO_MEMORY), Path.empty())


class PrefixIndex:
    """Looks requests up in a tree.

    Args:
        tree: what is cached.
        trails: of it, those that were left last.
        seen: what was.
        page_tokens: of a block.
        any_node: whether a request can go on from any node: in a model without linear layers.
        grain_tokens: a request goes on from a multiple of these alone; of page_tokens a multiple.
    """

    def __init__(
        self,
        tree: PrefixTree,
        trails: Trails,
        seen: SeenKeys,
        page_tokens: int,
        *,
        any_node: bool,
        grain_tokens: int,
    ) -> None:
        self._tree, self._trails, self._seen = tree, trails, seen
        self._grain_blocks = grain_tokens // page_tokens
        self._page_tokens, self._any_node = page_tokens, any_node

    def match(self, chain: KeyChain, num_tokens: int) -> Match:
        """Find the longest prefix of at most num_tokens - 1 tokens that can be gone on from."""
        most = (num_tokens - 1) // self._page_tokens
        path = self._trails.along(chain, most)
        goes_on = not path.nodes or self._may_go_on(path.nodes[-1])
        if goes_on:
            path = path.to(self._tree.along(chain.between(len(path.nodes), most)))
        nodes = path.nodes
        hit = len(nodes) // self._grain_blocks * self._grain_blocks
        while hit and not self._any_node and nodes[hit - 1].anchor is None:
            hit -= 1
        seen = len(nodes)
        while goes_on and seen < most and chain.key(seen) in self._seen:
            seen += 1
        reason = None if hit else self._reason(chain, most, len(nodes), seen)
        lookup = Lookup(hit * self._page_tokens, seen * self._page_tokens, reason)
        return Match(lookup, path.first(hit))

    def _may_go_on(self, node: Node) -> bool:
        """Whether a block behind a node may be known: if not, what follows need not be hashed.

        A node that has been dropped and is back may have lost blocks behind it before.
        """
        return node.is_followed or node.key in self._seen

    def _reason(self, chain: KeyChain, most: int, cached: int, seen: int) -> MissReason:
        if not most:
            return MissReason.TOO_SHORT
        if cached:
            return MissReason.NO_STATE
        if seen:
            return MissReason.EVICTED
        known = self._tree.knows_first_block(chain.unsalted())
        return MissReason.OTHER_SALT if known else MissReason.NO_KV
