"""What a way of drafting is asked, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sevenfold.engine.request import Request
from sevenfold.engine.sampling import Output

Paths = list[list[int]]


@dataclass(frozen=True)
class Ask:
    """A request that decodes, and how many tokens to guess for it.

    output: the sampler's view of it.
    num_tokens: length of a continuation, at most.
    num_branches: continuations, at most.
    """

    request: Request
    output: Output
    num_tokens: int
    num_branches: int


class Drafter(Protocol):
    """A way to guess what follows.

    is_free: whether guessing takes none of the device's time.
    """

    is_free: bool

    def warm_up(self, stopped: Callable[[], bool]) -> None:
        """Do what happens once, on a GPU, before a request waits for it, until it is stopped."""
        ...

    def read(self, requests: Sequence[Request], num_computed: int) -> None:
        """Look at more of prompts while the device computes so many tokens of them, or decodes."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[Paths]:
        """Return continuations for each request, the likeliest first; none where none is known."""
        ...

    def forget(self, request_id: str) -> None:
        """Give up what is kept for a request, which may come back."""
        ...
