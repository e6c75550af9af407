"""What a scheduler asks of the memory; engine.cache has the manager that answers."""

from typing import Protocol

from sevenfold.engine.request import Request


class Cache(Protocol):
    """Pages, state slots and snapshots of the requests that are open.

    A request reads its own fields (id, tokens, marks, salt, num_computed_tokens) to the cache.
    """

    def open(self, request: Request) -> int | None:
        """Match the longest reusable prefix and take a state slot and the pages of the match.

        Returns:
            Tokens already computed, at most one fewer than the request has; None when memory does
            not suffice now, and nothing was taken.
        """
        ...

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Take pages for that many tokens in all; False when memory is out, and none was taken."""
        ...

    def snapshots_due(self, request: Request, first: int, end: int) -> list[int]:
        """Reserve snapshots within tokens [first, end); return where, rising, in (first, end]."""
        ...

    def close(self, request: Request, *, keep: bool) -> None:
        """Give everything back now; keep=True lets the prefix cache own what it can use later."""
        ...
