"""Prefixes that conversations keep, whatever others ask in between."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sevenfold.config import StrictModel
from sevenfold.engine.cache.manager import CacheManager
from sevenfold.engine.cache.tree import Anchor, Node, PrefixTree
from sevenfold.engine.memory import MemoryPlan
from sevenfold.engine.request import Request

# The rest is for requests under way and for what everybody shares.
_MOST_SHARE = 0.5


class SessionLimits(StrictModel):
    """How many conversations keep their prefixes, and for how long.

    max_sessions: the one that has been idle longest makes room for one more; 0 keeps none.
    idle_s: seconds after its last answer that a conversation keeps its prefix.
    """

    max_sessions: Annotated[int, Field(ge=0)] = 64
    idle_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0


@dataclass(frozen=True)
class _Kept:
    """A path that a session holds in the tree, and those of its anchors that may not be evicted."""

    path: Sequence[Node]
    anchors: Sequence[Anchor]
    until_s: float
    num_bytes: int


class Sessions:
    """Paths of a tree by session, the longest idle first."""

    def __init__(
        self, tree: PrefixTree, plan: MemoryPlan, limits: SessionLimits, clock: Callable[[], float]
    ) -> None:
        self._tree, self._plan, self._limits, self._clock = tree, plan, limits, clock
        self._kept: OrderedDict[tuple[bytes, str], _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, name: tuple[bytes, str], path: Sequence[Node], leaves: Sequence[int]) -> None:
        """Hold a path for a session, in place of what it held before.

        Args:
            name: salt and name.
            path: nodes of the tree, first block first.
            leaves: token counts after which the next request may leave the path.
        """
        anchored = [node for node in path if node.anchor is not None]
        if self._plan.has_states:
            path = path[: path.index(anchored[-1]) + 1] if anchored else ()
        before = [[node for node in anchored if node.num_tokens <= leave] for leave in leaves]
        last = [nodes[-1] for nodes in (*before, anchored) if nodes]
        ends = {id(node): node.anchor for node in last}
        anchors = [anchor for anchor in ends.values() if anchor is not None]
        num_bytes = (
            len(path) * self._plan.page_bytes
            + sum(anchor.snapshot is not None for anchor in anchors) * self._plan.snapshot_bytes
        )
        kept = _Kept(tuple(path), anchors, self._clock() + self._limits.idle_s, num_bytes)
        self._tree.lock(kept.path)
        for anchor in kept.anchors:
            self._tree.pin(anchor)
        if name in self._kept:
            self._drop(name)
        self._kept[name] = kept
        self._shrink()

    def drop_oldest(self) -> bool:
        """Let go of the session that has been idle longest; False if there is none."""
        if not self._kept:
            return False
        self._drop(next(iter(self._kept)))
        return True

    def expire(self) -> None:
        """Let go of sessions that have been idle for too long."""
        now_s = self._clock()
        while self._kept and next(iter(self._kept.values())).until_s <= now_s:
            self.drop_oldest()

    def _shrink(self) -> None:
        most = int(_MOST_SHARE * self._plan.budget_bytes)
        while len(self._kept) > self._limits.max_sessions or self._num_bytes > most:
            self.drop_oldest()

    @property
    def _num_bytes(self) -> int:
        """Bytes held, those that sessions share counted for each of them."""
        return sum(kept.num_bytes for kept in self._kept.values())

    def _drop(self, name: tuple[bytes, str]) -> None:
        kept = self._kept.pop(name)
        for anchor in kept.anchors:
            self._tree.unpin(anchor)
        self._tree.unlock(kept.path)


class SessionCache(CacheManager):
    """A cache manager in which requests of a session keep their prefix for its next one.

    What a session keeps goes only when it expires, when others push it out by the limits, or when a
    request that runs alone needs the memory: the plan's promise comes first.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        *,
        headroom_tokens: int = 256,
        grain_tokens: int | None = None,
        limits: SessionLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty; clock gives seconds that never fall."""
        super().__init__(plan, headroom_tokens=headroom_tokens, grain_tokens=grain_tokens)
        self._sessions = Sessions(self._tree, plan, limits, clock)

    @property
    def num_sessions(self) -> int:
        """Conversations that keep a prefix now."""
        self._sessions.expire()
        return len(self._sessions)

    def open(self, request: Request) -> int | None:
        """Open a request as CacheManager does; alone, it may take what sessions keep."""
        self._sessions.expire()
        computed = super().open(request)
        while computed is None and not self._holdings and self._sessions.drop_oldest():
            computed = super().open(request)
        return computed

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Take pages as CacheManager does; alone, a request may take what sessions keep."""
        while not super().extend(request, num_tokens):
            if len(self._holdings) > 1 or not self._sessions.drop_oldest():
                return False
        return True

    def close(self, request: Request, *, keep: bool) -> None:
        """Give everything back but what the request's session keeps."""
        if keep and request.session is not None:
            holding = self._holding(request)
            self._settle(holding)
            # What follows the answer's beginning may not come again as it is. That lies at the
            # last mark where a template opens the answer behind it; but marks may lie anywhere.
            leaves = (*request.marks[-1:], len(request.prompt))
            self._sessions.keep((request.salt, request.session), holding.path, leaves)
        super().close(request, keep=keep)

    def clear(self) -> None:
        """Forget every prefix that no open request uses, those of sessions too."""
        while self._sessions.drop_oldest():
            pass
        super().clear()
