"""Which heads of which states travel between ranks, and what becomes of those that arrive.

    S_r = sum over c < r of decay^(n (r - c - 1)) L_c      over stretches that the document reaches

A state goes to the ranks that the document reaches, and of it the heads that have not decayed to 0
on the way: slopes and lengths say so on the host, so every rank knows what arrives.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.parallel.context.batch import SLOTS
from sevenfold.parallel.context.cut import Cut

# What has decayed by more is 0: the smallest number that fp32 holds with all its digits.
LEAST = torch.finfo(torch.float32).tiny


class Route(NamedTuple):
    """The heads of one stretch's state that go from one rank to another.

    slot: of the sending rank's two stretches.
    stretch: the same, as the cut counts.
    first_head: those from here on go.
    uses: the receiving rank's slots that need it, and the tokens that lie between.
    """

    slot: int
    stretch: int
    first_head: int
    uses: tuple[tuple[int, int], ...]


class StatePlan(NamedTuple):
    """[ranks] routes to and from each rank; num_heads is H."""

    sent: tuple[tuple[Route, ...], ...]
    received: tuple[tuple[Route, ...], ...]
    num_heads: int

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Heads to and from each rank."""
        counts = [[self.heads_of(routes) for routes in way] for way in (self.sent, self.received)]
        return counts[0], counts[1]

    def heads_of(self, routes: Sequence[Route]) -> int:
        """How many heads go by some routes."""
        return sum(self.num_heads - route.first_head for route in routes)


def first_head(log_decay: Sequence[float], distance: int) -> int:
    """Return the first head whose state is not 0 after so many tokens; H if all are.

    MiniMax's heads go from fast to slow, so the heads from there on are those that count.
    """
    limit = math.log(LEAST)
    alive = (h for h, a in enumerate(log_decay) if a * distance >= limit)
    return next(alive, len(log_decay))


@lru_cache(maxsize=1024)
def plan_states(cut: Cut, rank: int, log_decay: tuple[float, ...]) -> StatePlan:
    """Decide which heads of which states travel.

    Args:
        cut: of the row.
        rank: whose plan.
        log_decay: of each head.
    """
    ranks = range(cut.num_ranks)
    sent = tuple(_routes(cut, rank, other, log_decay) for other in ranks)
    received = tuple(_routes(cut, other, rank, log_decay) for other in ranks)
    return StatePlan(sent, received, len(log_decay))


def outgoing(states: Tensor, plan: StatePlan) -> Tensor:
    """[heads, K, V] of own states [slots, H, K, V], for rank after rank."""
    routes = [route for routes in plan.sent for route in routes]
    parts = [states[route.slot, route.first_head :] for route in routes]
    return torch.cat(parts) if parts else states[0, :0]


def returned(arrived: Tensor, plan: StatePlan) -> Tensor:
    """[slots, H, K, V], the transpose of `outgoing`: sums of what comes back of own states."""
    states = arrived.new_zeros(len(SLOTS), plan.num_heads, *arrived.shape[1:])
    at = 0
    for route in (route for routes in plan.sent for route in routes):
        end = at + plan.num_heads - route.first_head
        states[route.slot, route.first_head :] += arrived[at:end]
        at = end
    return states


def states_before(arrived: Tensor, plan: StatePlan, log_decay: tuple[float, ...]) -> Tensor:
    """[slots, H, K, V]: the state before each own stretch, of all that arrived [heads, K, V]."""
    before = arrived.new_zeros(len(SLOTS), plan.num_heads, *arrived.shape[1:])
    for slot, head, heads, power in _uses(plan, log_decay, arrived):
        before[slot, head:].addcmul_(arrived[heads], power)
    return before


def gradients_of_arrived(dbefore: Tensor, plan: StatePlan, log_decay: tuple[float, ...]) -> Tensor:
    """[heads, K, V], the transpose of states_before."""
    darrived = dbefore.new_zeros(sum(plan.sizes[1]), *dbefore.shape[2:])
    for slot, head, heads, power in _uses(plan, log_decay, dbefore):
        darrived[heads].addcmul_(dbefore[slot, head:], power)
    return darrived


def _routes(cut: Cut, source: int, target: int, log_decay: tuple[float, ...]) -> tuple[Route, ...]:
    found = []
    for slot, stretch in enumerate(cut.of_rank(source)):
        reached = enumerate(cut.distance(stretch, later) for later in cut.of_rank(target))
        uses = tuple((s, d) for s, d in reached if d is not None)
        uses = tuple((s, d) for s, d in uses if first_head(log_decay, d) < len(log_decay))
        if uses:
            least = min(first_head(log_decay, d) for _, d in uses)
            found.append(Route(slot, stretch, least, uses))
    return tuple(found)


def _uses(
    plan: StatePlan, log_decay: tuple[float, ...], states: Tensor
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Slot that needs a state, its first head, the heads that arrived, and their decay."""
    at = 0
    for route in (route for routes in plan.received for route in routes):
        end = at + plan.num_heads - route.first_head
        for slot, distance in route.uses:
            head = first_head(log_decay, distance)
            power = _powers(log_decay, distance, states.device, states.dtype)[head:]
            yield slot, head, slice(at + head - route.first_head, end), power
        at = end


@lru_cache(maxsize=1024)
def _powers(
    log_decay: tuple[float, ...], distance: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """decay^distance [H, 1, 1], 0 below LEAST; sent once, and nothing waits."""
    powers = torch.exp(torch.tensor(log_decay, dtype=torch.float64) * distance)
    powers = (powers * (powers >= LEAST)).to(dtype)[:, None, None]
    return powers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else powers
