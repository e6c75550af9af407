"""What routers did with a batch: sums that each layer takes, and all layers' statistics of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RouterCounts(NamedTuple):
    """What one layer's router did with T tokens, k choices each.

    totals: [P, 2 E + 1], as route_and_count returns them: their sum over P is meant.
    kept: [n], choices that were not dropped, of some experts or token groups; the sum is meant.
    num_choices: T k.
    """

    totals: Tensor
    kept: Tensor
    num_choices: int


class RouterStats(NamedTuple):
    """What the routers of L layers did with one batch.

    balance_loss: [L], E * sum_i f_i m_i; f_i the share of tokens that chose expert i, m_i its mean
        probability; num_experts_per_tok when balanced.
    z_loss: [L], mean of logsumexp(logits)^2.
    dropped: [L], share of the choices that were dropped.
    load: [L, E], f_i before any drop.
    """

    balance_loss: Tensor
    z_loss: Tensor
    dropped: Tensor
    load: Tensor

    @property
    def rows(self) -> Tensor:
        """[L, 3 + E]: balance_loss, z_loss, dropped and load of each layer."""
        scalars = (self.balance_loss, self.z_loss, self.dropped)
        return torch.cat([torch.stack(scalars, 1), self.load], 1)


def router_stats(
    counts: Sequence[RouterCounts],
    num_experts_per_tok: int,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda chosen: chosen,
) -> RouterStats:
    """Take the statistics of all layers at once: as many operations for one as for many.

    Where ranks hold different tokens these are one rank's shares: shares sum to the whole.

        balance_r = E * sum_i f_i (sum over own tokens of p_i) / T      f_i and T over all ranks

    Ranks may hold different numbers of tokens, even none: T is what all ranks' tokens chose, by k.

    f takes no gradient, so no collective has one, and the sum of the ranks' gradients is the whole
    micro-batch's.

    Args:
        counts: one or more, of layers that are alike and saw the same tokens.
        num_experts_per_tok: k.
        sum_over_ranks: sums a tensor over the ranks that hold different tokens.
    """
    totals = torch.stack([layer.totals for layer in counts]).sum(1)  # [L, 2 E + 1]
    E = totals.shape[1] // 2
    chosen = sum_over_ranks(totals[:, E:-1].detach())
    num_choices = chosen.sum(1, keepdim=True)
    num_tokens = num_choices / num_experts_per_tok
    shares = totals / num_tokens
    probabilities, load, z_loss = shares[:, :E], shares[:, E:-1].detach(), shares[:, -1]
    balance = E * (chosen / num_tokens * probabilities).sum(1)
    kept = torch.stack([layer.kept for layer in counts]).sum(1)
    dropped = (counts[0].num_choices - kept).to(load.dtype) / num_choices[:, 0]
    return RouterStats(balance, z_loss, dropped, load)
