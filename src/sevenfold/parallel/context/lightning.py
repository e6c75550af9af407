"""Lightning attention over a row that several ranks hold (LASP+): one all-gather each way.

With L_p the state that rank p's last piece adds, n the tokens of a stretch, and i the token's place
in the first piece of rank r, counted from 0:

    S_r = sum over p < r of decay^(n (r - p - 1)) L_p      over ranks that the document reaches
    o_i = o_i, from this rank's tokens alone, + decay^(i + 1) q_i^T S_r

and backward, with G_r = sum_i decay^(i + 1) q_i do_i^T:

    dL_p = sum over r > p of decay^(n (r - p - 1)) G_r

All in fp32: a document border makes a sum's term absent, never small. Source: arXiv 2501.08313
section 3.2.2 (LASP+), 2502.07563 (LASP-2).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models import Batch
from sevenfold.models.mixers.lightning import LightningState
from sevenfold.ops import full_precision, lightning_attention
from sevenfold.parallel.context.batch import ContextBatch, stretch_of

# What has decayed by more is 0: the smallest number that fp32 holds with all its digits.
_LEAST = torch.finfo(torch.float32).tiny


class ContextLightning:
    """Stands in for LightningAttention.attend on a context rank."""

    def __init__(self, log_decay: Tensor, group: dist.ProcessGroup) -> None:
        """Args: log_decay [H] of the layer, as the mixer has it; group of the context ranks."""
        self.log_decay, self.group = log_decay, group
        self.reach_tokens = reach_tokens(float(log_decay.max()))

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        state: LightningState | None,
    ) -> tuple[Tensor, None]:
        """Attend [1, T, H, D] over this stretch and what comes before it; no state goes in."""
        stretch, log_decay = stretch_of(batch, state), self.log_decay
        result = lightning_attention(
            q,
            k,
            v,
            log_decay,
            return_final_state=stretch.crosses,
            cu_seqlens=stretch.cu_seqlens,
        )
        if result.final_state is None:
            return result.o, None
        before = _states_before(result.final_state[-1], log_decay, stretch, self.group)
        return self._with_earlier(result.o, q, before, log_decay, stretch), None

    def _with_earlier(
        self, o: Tensor, q: Tensor, before: Tensor, log_decay: Tensor, batch: ContextBatch
    ) -> Tensor:
        """Add what the first piece's tokens see of the state before them."""
        if not batch.enters:
            # All ranks take part in the gather's backward, those that receive nothing too.
            return _Tied.apply(o, before)
        n = min(batch.lengths[0], self.reach_tokens)
        place = torch.arange(1, n + 1, device=q.device)
        fading = powers(log_decay.to(before.dtype), place)  # [H, n]
        faded = q[0, :n].to(before.dtype) * fading.t()[..., None]  # [n, H, K]
        with full_precision(q.device):
            earlier = torch.einsum("nhk,hkv->nhv", faded, before)
        return torch.cat([(o[0, :n] + earlier).to(o.dtype), o[0, n:]])[None]


def reach_tokens(log_decay: float) -> int:
    """Tokens after which the slowest head's state is 0 in fp32.

    decay^n < 2^-126
    """
    if log_decay == 0.0:
        return 2**62
    return math.ceil(math.log(_LEAST) / log_decay)


def powers(log_decay: Tensor, distances: Tensor) -> Tensor:
    """decay^distance, [H, distances]; 0 where the distance is negative or the power is tiny."""
    power = torch.exp(log_decay[:, None] * distances.clamp(min=0))
    return power * ((distances >= 0) & (power >= _LEAST))


def _states_before(
    added: Tensor, log_decay: Tensor, batch: ContextBatch, group: dist.ProcessGroup
) -> Tensor:
    """[H, K, V]: the state that this stretch's first token meets, before its decay."""
    exact = log_decay.to(added.dtype)
    return _StatesBefore.apply(
        added, powers(exact, batch.distances), powers(exact, batch.ahead), group
    )


class _StatesBefore(torch.autograd.Function):
    """The gather and decayed sum; backward it is the same from the other side."""

    @staticmethod
    def forward(
        ctx: Any, added: Tensor, received: Tensor, sent: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.group = sent, group
        return _gathered_sum(added, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gathered_sum(grads[0], ctx.sent, ctx.group), None, None, None


class _Tied(torch.autograd.Function):
    """o as it is, with `before` in its graph at a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, before: Tensor) -> Tensor:
        ctx.like = (before.shape, before.dtype)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.like
        return grads[0], grads[0].new_zeros(shape, dtype=dtype)


def _gathered_sum(state: Tensor, weights: Tensor, group: dist.ProcessGroup) -> Tensor:
    """sum_p weights[h, p] state_p[h]."""
    gathered = state.new_empty(weights.shape[1], *state.shape)
    dist.all_gather_into_tensor(gathered, state[None].contiguous(), group=group)
    with full_precision(state.device):
        return torch.einsum("hp,phkv->hkv", weights, gathered)
