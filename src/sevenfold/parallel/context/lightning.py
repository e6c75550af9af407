"""Lightning attention over a row that several ranks hold (LASP+): one exchange of states each way.

With L_c the state that stretch c's last piece adds, n the tokens of a stretch, and i the token's
place in stretch r, counted from 0:

    S_r = sum over c < r of decay^(n (r - c - 1)) L_c      over stretches that the document reaches
    o_i = o_i, from this stretch alone, + decay^(i + 1) q_i^T S_r

and backward, with G_r = sum_i decay^(i + 1) q_i do_i^T, which comes to dL_c as L_c to S_r:

    dL_c = sum over r > c of decay^(n (r - c - 1)) G_r       dq_i += decay^(i + 1) S_r do_i
    dk_i += decay^(n - 1 - i) dL_c v_i                       dv_i += decay^(n - 1 - i) dL_c^T k_i

The exchange runs beside the stretch's own recurrence: L_c comes first, from keys and values alone.
Backward autograd takes nodes in the reverse of their creation, so the gradients G travel while the
recurrence's backward runs; what they add goes into its results in place. All of it touches only
tokens next to a border, as far as a head reaches. Source: arXiv 2501.08313 section 3.2.2 (LASP+),
2502.07563 (LASP-2).
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from sevenfold.models import Batch
from sevenfold.models.mixers.lightning import LightningState
from sevenfold.ops import Span, lightning_add_read, lightning_added, lightning_attention
from sevenfold.parallel.collectives import Flight
from sevenfold.parallel.context.batch import SLOTS, ContextBatch, context_batch
from sevenfold.parallel.context.states import (
    StatePlan,
    gradients_of_arrived,
    outgoing,
    plan_states,
    returned,
    states_before,
)
from sevenfold.parallel.exchange import Collective


class HasDecay(Protocol):
    """A mixer of heads with a decay."""

    log_decay: Tensor


class ContextLightning:
    """Stands in for LightningAttention.attend on a context rank."""

    def __init__(self, mixer: HasDecay, group: dist.ProcessGroup) -> None:
        """Take the part of one layer's attention.

        Args:
            mixer: the layer's, whose decay [H] may move to a device.
            group: of context ranks.

        Raises:
            ValueError: a head forgets all at once, log_decay = -inf.
        """
        self.mixer, self.group = mixer, group
        self.on_host = tuple(mixer.log_decay.tolist())
        if not all(map(math.isfinite, self.on_host)):
            raise ValueError(f"log_decay must be finite on context ranks, got {self.on_host}")

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
        plan = plan_states(own.cut, own.rank, self.on_host)
        passage = _Passage(own, plan, (log_decay, self.on_host), self.group)
        q, k, v = _Leave.apply(q, k, v, passage)
        o = lightning_attention(q, k, v, log_decay, cu_seqlens=own.cu_seqlens).o
        return _Enter.apply(o, q, passage), None


class _Passage:
    """One layer's states on their way, and their gradients.

    ends, starts: tokens that add to the states that leave, and that read those that come.
    held: what the backward of _Enter leaves for that of _Leave: do, and the states that came.
    """

    def __init__(
        self,
        own: ContextBatch,
        plan: StatePlan,
        decay: tuple[Tensor, tuple[float, ...]],
        group: dist.ProcessGroup,
    ) -> None:
        self.plan, (self.log_decay, self.on_host) = plan, decay
        self.ends, self.starts = leaving(own, plan), entered(own)
        self.flight = Flight(*plan.sizes, Collective(group))
        self.held: tuple[Tensor, Tensor] | None = None

    def added(self, a: Tensor, b: Tensor, *, from_end: bool) -> Tensor:
        spans = self.ends if from_end else self.starts
        return lightning_added(a, b, self.log_decay, spans, from_end=from_end)

    def read(self, y: Tensor, x: Tensor, states: Tensor, *, from_end: bool) -> None:
        spans = self.ends if from_end else self.starts
        lightning_add_read(y, x, states, self.log_decay, spans, from_end=from_end)


def leaving(own: ContextBatch, plan: StatePlan) -> tuple[Span, ...]:
    """The last piece of each stretch whose state a rank waits for."""
    wanted = {route.slot for routes in plan.sent for route in routes}
    pieces = [(piece.start, piece.length) for piece in own.last_pieces]
    return tuple(Span(*pieces[slot]) if slot in wanted else Span(0, 0) for slot in SLOTS)


def entered(own: ContextBatch) -> tuple[Span, ...]:
    """The first piece of each stretch that begins inside a document."""
    enters = [own.cut.enters(stretch) for stretch in own.stretches]
    pieces = [(piece.start, piece.length) for piece in own.first_pieces]
    return tuple(Span(*pieces[slot]) if enters[slot] else Span(0, 0) for slot in SLOTS)


class _Leave(torch.autograd.Function):
    """Sends the states that own tokens add; q, k and v go on as they are."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, passage: _Passage
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.passage = passage
        ctx.save_for_backward(k, v)
        added = passage.added(k[0], v[0], from_end=True)
        flight = passage.flight
        flight.start(outgoing(added, passage.plan), flight.sent, flight.received)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        passage, (dq, dk, dv) = ctx.passage, grads
        # o hangs on q, k and v, so the backward of _Enter has run, whatever a gradient is asked of.
        (k, v), (do, before) = ctx.saved_tensors, passage.held
        passage.held = None
        # In place: they are the recurrence's own results, and nobody else's.
        passage.read(dq[0], do[0], before.mT, from_end=False)
        dadded = returned(passage.flight.finish(), passage.plan)
        passage.read(dk[0], v[0], dadded.mT, from_end=True)
        passage.read(dv[0], k[0], dadded, from_end=True)
        return dq, dk, dv, None


class _Enter(torch.autograd.Function):
    """Adds to o, in place, what own tokens read of the states that come."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, passage: _Passage) -> Tensor:
        arrived = passage.flight.finish()
        before = states_before(arrived, passage.plan, passage.on_host)
        ctx.passage = passage
        ctx.save_for_backward(q, before)
        ctx.mark_dirty(o)
        passage.read(o[0], q[0], before, from_end=False)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        passage, (q, before), (do,) = ctx.passage, ctx.saved_tensors, grads
        dbefore = passage.added(q[0], do[0], from_end=False)
        darrived = gradients_of_arrived(dbefore, passage.plan, passage.on_host)
        flight = passage.flight
        flight.start(darrived, flight.received, flight.sent)
        passage.held = do, before
        return do, None, None
