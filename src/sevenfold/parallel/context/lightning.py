"""Lightning attention over a row that several ranks hold (LASP+): one exchange of states each way.

With L_c the state that stretch c's last piece adds, n the tokens of a stretch, and i the token's
place in stretch r, counted from 0:

    S_r = sum over c < r of decay^(n (r - c - 1)) L_c      over stretches that the document reaches
    o_i = o_i, from this stretch alone, + decay^(i + 1) q_i^T S_r

and backward, with G_r = sum_i decay^(i + 1) q_i do_i^T:

    dL_c = sum over r > c of decay^(n (r - c - 1)) G_r

All in fp32. A state goes to the ranks that the document reaches, and of it the heads that have not
decayed to 0 on the way: slopes and lengths say so on the host, so every rank knows what arrives.

The exchange runs beside the stretch's own recurrence: L_c comes first, from keys and values alone,
2 K V more operations a token. Backward autograd takes nodes in the reverse of their creation, so
the gradients G travel while the recurrence's backward runs. Source: arXiv 2501.08313 section 3.2.2
(LASP+), 2502.07563 (LASP-2).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models import Batch
from sevenfold.models.mixers.lightning import LightningState
from sevenfold.ops import lightning_attention
from sevenfold.parallel.collectives import Flight, begin_exchange, end_exchange
from sevenfold.parallel.context.batch import SLOTS, ContextBatch, context_batch
from sevenfold.parallel.context.cut import Cut
from sevenfold.parallel.context.states import Decay, add_read, added_states


class HasDecay(Protocol):
    """A mixer of heads with a decay."""

    log_decay: Tensor


class ContextLightning:
    """Stands in for LightningAttention.attend on a context rank."""

    def __init__(self, mixer: HasDecay, group: dist.ProcessGroup) -> None:
        """Args: the layer's mixer, whose decay [H] may move to a device; group of context ranks."""
        self.mixer, self.group = mixer, group
        self.on_host = tuple(mixer.log_decay.tolist())

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: LightningState | None,
    ) -> tuple[Tensor, None]:
        """Attend [1, T, H, D] over own stretches and what comes before; no state goes in."""
        own, log_decay = context_batch(batch, state), self.mixer.log_decay
        if not own.cut.crosses:
            return lightning_attention(q, k, v, log_decay, cu_seqlens=own.cu_seqlens).o, None
        decay = Decay(log_decay.to(torch.promote_types(q.dtype, torch.float32)), self.on_host)
        plan = plan_states(own.cut, own.rank, self.on_host)
        added = added_states(k[0], v[0], decay, _leaving(own, plan))
        sent, received = ([_num_heads(r, added) for r in way] for way in plan)
        flight = Flight(sent, received, self.group)
        underway = begin_exchange(_outgoing(added, plan), flight)
        o = lightning_attention(q, k, v, log_decay, cu_seqlens=own.cu_seqlens).o
        # Ranks that nothing reaches take part in the backward's exchange too.
        before = _Decayed.apply(end_exchange(underway, flight), plan, decay)
        return add_read(o, q[0], before, decay, _entered(own)), None


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
    """[ranks] routes to and from each rank."""

    sent: tuple[tuple[Route, ...], ...]
    received: tuple[tuple[Route, ...], ...]


@lru_cache(maxsize=1024)
def plan_states(cut: Cut, rank: int, log_decay: tuple[float, ...]) -> StatePlan:
    """Decide which heads of which states travel.

    Args:
        cut: of the row.
        rank: whose plan.
        log_decay: of each head.
    """
    ranks = range(cut.num_ranks)
    decay = Decay(torch.empty(0), log_decay)
    sent = tuple(_routes(cut, rank, other, decay) for other in ranks)
    return StatePlan(sent, tuple(_routes(cut, other, rank, decay) for other in ranks))


def _routes(cut: Cut, source: int, target: int, decay: Decay) -> tuple[Route, ...]:
    found = []
    for slot, stretch in enumerate(cut.of_rank(source)):
        reached = enumerate(cut.distance(stretch, later) for later in cut.of_rank(target))
        uses = tuple((s, d) for s, d in reached if d is not None)
        uses = tuple((s, d) for s, d in uses if decay.first_head(d) < len(decay.on_host))
        if uses:
            first_head = min(decay.first_head(d) for _, d in uses)
            found.append(Route(slot, stretch, first_head, uses))
    return tuple(found)


def _leaving(own: ContextBatch, plan: StatePlan) -> tuple:
    wanted = {route.slot for routes in plan.sent for route in routes}
    return tuple(own.last_pieces[slot] if slot in wanted else None for slot in SLOTS)


def _entered(own: ContextBatch) -> tuple:
    enters = [own.cut.enters(stretch) for stretch in own.stretches]
    return tuple(own.first_pieces[slot] if enters[slot] else None for slot in SLOTS)


def _num_heads(routes: Sequence[Route], states: Tensor) -> int:
    return sum(states.shape[1] - route.first_head for route in routes)


def _outgoing(states: Tensor, plan: StatePlan) -> Tensor:
    """[heads, K, V] of own states [slots, H, K, V] for rank after rank."""
    routes = [route for routes in plan.sent for route in routes]
    parts = [states[route.slot, route.first_head :] for route in routes]
    return torch.cat(parts) if parts else states[0, :0]


class _Decayed(torch.autograd.Function):
    """[slots, H, K, V]: the state before each own stretch, of all that arrived [heads, K, V]."""

    @staticmethod
    def forward(ctx: Any, arrived: Tensor, plan: StatePlan, decay: Decay) -> Tensor:
        ctx.plan, ctx.decay = plan, decay
        before = arrived.new_zeros(len(SLOTS), len(decay.on_host), *arrived.shape[1:])
        for slot, head, power, heads in _uses(plan, decay):
            before[slot, head:] += power * arrived[heads]
        return before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dbefore,), plan = grads, ctx.plan
        received = sum(_num_heads(routes, dbefore) for routes in plan.received)
        darrived = dbefore.new_zeros(received, *dbefore.shape[2:])
        for slot, head, power, heads in _uses(plan, ctx.decay):
            darrived[heads] += power * dbefore[slot, head:]
        return darrived, None, None


def _uses(plan: StatePlan, decay: Decay) -> Iterator[tuple[int, int, Tensor, slice]]:
    """Slot that needs a state, its first head, the decay on the way, and the heads that arrived."""
    at = 0
    for route in (route for routes in plan.received for route in routes):
        end = at + len(decay.on_host) - route.first_head
        for slot, distance in route.uses:
            head = decay.first_head(distance)
            # A fill, not a copy from the host.
            places = torch.full((1,), distance, device=decay.log_decay.device)
            power = decay.powers(places, head)[0, :, None, None]
            yield slot, head, power, slice(at + head - route.first_head, end)
        at = end
