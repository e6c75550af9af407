"""Tokens that all tensor ranks hold, of which each sends its part to the experts."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from sevenfold.parallel.collectives import join_tokens, split_tokens


@dataclass(frozen=True)
class SharedTokens:
    """Stretches of tokens, each parted among the ranks in their order; the last may have fewer.

    sizes: tokens of each stretch; without padding they are equal, and the ranks divide them.
    group: the ranks.
    """

    sizes: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def own_sizes(self) -> tuple[int, ...]:
        """This rank's tokens of each stretch."""
        before = dist.get_rank(self.group) * self._part
        return tuple(min(max(n - before, 0), self._part) for n in self.sizes)

    @property
    def _part(self) -> int:
        """Tokens of a stretch that a rank takes at most; one, where there is none."""
        return max(1, -(-max(self.sizes) // dist.get_world_size(self.group)))

    @property
    def _room(self) -> int:
        return self._part * dist.get_world_size(self.group)

    def split(self, x: Tensor) -> Tensor:
        """Take this rank's tokens of x [T, D]; the gradient comes from all ranks."""
        x = split_tokens(_filled(x, self.sizes, self._room), self.group, len(self.sizes))
        return _cut(x, self.own_sizes, self._part)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of split; the gradient is of this rank's tokens."""
        x = join_tokens(_filled(x, self.own_sizes, self._part), self.group, len(self.sizes))
        return _cut(x, self.sizes, self._room)


def _filled(x: Tensor, sizes: tuple[int, ...], room: int) -> Tensor:
    """Put zeros behind each stretch, up to its room."""
    if all(n == room for n in sizes):
        return x
    parts = zip(x.split(sizes), sizes, strict=True)
    return torch.cat([F.pad(part, (0, 0, 0, room - n)) for part, n in parts])


def _cut(x: Tensor, sizes: tuple[int, ...], room: int) -> Tensor:
    """The inverse of _filled."""
    if all(n == room for n in sizes):
        return x
    return torch.cat([part[:n] for part, n in zip(x.split(room), sizes, strict=True)])
