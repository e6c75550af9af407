"""How rows travel between ranks: what begins an all-to-all, and what waits for it."""

from typing import Protocol

from torch import Tensor
from torch import distributed as dist


class Arrival(Protocol):
    """What comes."""

    def wait(self) -> object:
        """Let what is launched from now on find it there: on a GPU its stream waits."""
        ...


class Exchange(Protocol):
    """An all-to-all between the ranks of a group."""

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Arrival]:
        """Send each rank its rows, for rank 0 first.

        Args:
            rows: [sum(sent), ...], contiguous.
            sent, received: rows for and from each rank.

        Returns:
            [sum(received), ...], from rank 0 first, filled when the arrival has been waited for.
        """
        ...


class Collective:
    """The all-to-all of a group's backend."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Arrival]:
        """As Exchange says."""
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arrived, rows, received, sent, group=self._group, async_op=True
        )
        assert work is not None
        return arrived, work
