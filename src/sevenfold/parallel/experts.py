"""Expert parallelism: each rank holds some experts, and tokens travel to them and back.

The router is global: an expert's capacity is shared over the expert-parallel group before any token
is dropped, in the order of the ranks, which is that of the tokens; so a group drops what one
process with all its tokens would.

Source: arXiv 2501.08313 section 2.2.2 (global router), 3.1 (groups).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models.feed_forward import Experts, MixtureOfExperts, RouterStats
from sevenfold.ops import Dispatch, combine, gather_rows, plan_dispatch
from sevenfold.parallel.collectives import exchange_rows
from sevenfold.parallel.layout import Layout


def divide_experts(moe: MixtureOfExperts, layout: Layout) -> None:
    """Keep this rank's experts, and send tokens to the ranks that hold theirs.

    Args:
        moe: changed in place; names stay, the stacked weights have fewer experts.
        layout: with expert above 1.
    """
    index, size = layout.place.expert, layout.config.expert
    for weight in (moe.experts.gate_up_proj, moe.experts.down_proj):
        weight.data = weight.data.chunk(size)[index].clone()
    route = ExpertRoute(
        moe.experts, layout.group("expert"), moe.moe.num_local_experts, index, moe.capacity
    )
    moe.routed = route  # pyright: ignore[reportAttributeAccessIssue]


def share_statistics(moe: MixtureOfExperts, layout: Layout) -> None:
    """Take a router's statistics over all ranks' tokens, each rank its share of the losses.

    Args:
        moe: changed in place.
        layout: of more than one rank.
    """
    moe.stats = partial(  # pyright: ignore[reportAttributeAccessIssue]
        shared_stats, layout=layout
    )


def shared_stats(logits: Tensor, experts: Tensor, kept: Tensor, *, layout: Layout) -> RouterStats:
    """Return this rank's share of the statistics of all ranks' tokens: shares sum to the whole.

        balance_r = E * sum_i f_i (sum over own tokens of p_i) / T      f_i and T over all ranks

    f takes no gradient, so no collective has one, and the sum of the ranks' gradients is the whole
    micro-batch's.

    Args:
        logits: [T_r, E] of the rank's tokens, as many on each rank.
        experts: [T_r, k] chosen, before drops.
        kept: [E] or fewer; choices of this rank's tokens that were not dropped.
        layout: of the run.
    """
    E, num_tokens = logits.shape[1], len(logits) * layout.config.token_ranks
    chosen = (experts.flatten()[:, None] == torch.arange(E, device=experts.device)).sum(0)
    own = chosen.to(logits.dtype) / num_tokens
    load = layout.sum_over_tokens(own)
    balance = E * (load * logits.softmax(-1).sum(0)).sum() / num_tokens
    z_loss = torch.logsumexp(logits, dim=-1).square().sum() / num_tokens
    lost = experts.numel() - kept.sum().to(logits.dtype)
    dropped = lost / (num_tokens * experts.shape[1])
    return RouterStats(balance, z_loss, own, dropped)


@dataclass(frozen=True)
class ExpertRoute:
    """Stands in for MixtureOfExperts.routed where ranks hold different experts.

    experts: this rank's, E / size of them from index * E / size on.
    group: the ranks that hold the others.
    num_experts: E.
    index: this rank in the group.
    capacity: tokens of the group -> rows that one expert takes, in training; None is any number.
    """

    experts: Experts
    group: dist.ProcessGroup
    num_experts: int
    index: int
    capacity: Callable[[int], int | None]

    def __call__(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Send tokens [T, D] to their experts [T, k]: their sum by weights, and choices kept."""
        plan = plan_dispatch(experts, self.num_experts, None)
        counts = self._counts(plan.rows_per_expert)
        quotas = self._quotas(counts, len(tokens))
        plan = limited(plan, counts[self.index], quotas[self.index])
        rows = gather_rows(tokens, plan)
        size = len(counts)
        sent = quotas[self.index].view(size, -1).sum(1).tolist()
        own = quotas.view(size, size, -1)[:, self.index]  # [ranks, E / size]
        received = own.sum(1).tolist()
        arrived = exchange_rows(rows, sent, received, self.group)
        done = self._run_experts(arrived, own)
        rows = exchange_rows(done, received, sent, self.group)
        return combine(rows, weights.to(rows.dtype), plan), plan.rows_per_expert

    def _counts(self, rows_per_expert: Tensor) -> Tensor:
        """[ranks, E] int64 on the host: choices of each rank. The exchange needs them there."""
        size = dist.get_world_size(self.group)
        counts = rows_per_expert.new_empty(size, self.num_experts)
        dist.all_gather_into_tensor(counts, rows_per_expert[None], group=self.group)
        return counts.cpu().long()

    def _quotas(self, counts: Tensor, num_tokens: int) -> Tensor:
        """[ranks, E]: choices of each rank that are kept."""
        capacity = None
        if self.experts.training:
            capacity = self.capacity(num_tokens * len(counts))
        return counts if capacity is None else share_capacity(counts, capacity)

    def _run_experts(self, arrived: Tensor, own: Tensor) -> Tensor:
        """Run rows that come from rank after rank, sorted by expert within each: the same order."""
        local = torch.arange(own.shape[1]).repeat(len(own))
        expert = torch.repeat_interleave(local, own.flatten()).to(arrived.device)
        if not len(arrived):
            # Experts without a token take a gradient of zero: their shards' reduction waits for it.
            arrived, expert = arrived.new_zeros(1, arrived.shape[1]), expert.new_zeros(1)
        ones = arrived.new_ones(len(arrived), 1)
        plan = plan_dispatch(expert[:, None], own.shape[1], None)
        return self.experts(arrived, ones, plan)[: len(expert) if own.sum() else 0]


def share_capacity(counts: Tensor, capacity: int) -> Tensor:
    """Give each expert's capacity to the ranks in their order.

        quota_r = min(count_r, max(0, capacity - sum over q < r of count_q))

    Args:
        counts: [ranks, E] choices of each rank.
        capacity: rows that one expert takes in the whole group.

    Returns:
        [ranks, E].
    """
    earlier = counts.cumsum(0) - counts
    return torch.minimum(counts, (capacity - earlier).clamp(min=0))


def limited(plan: Dispatch, counts: Tensor, quota: Tensor) -> Dispatch:
    """Keep the first choices of each expert.

    Args:
        plan: of all choices.
        counts: [E] on the host; choices of each expert.
        quota: [E] on the host; how many stay.
    """
    if torch.equal(counts, quota):
        return plan
    device, R = plan.choice.device, len(plan.choice)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = torch.arange(R) - first
    stays = (place < torch.repeat_interleave(quota, counts)).to(device)
    choice = plan.choice[stays]
    row = torch.full((plan.row.numel(),), len(choice), device=device)
    row[choice] = torch.arange(len(choice), device=device)
    return Dispatch(choice, row.view(plan.row.shape), quota.to(torch.int32).to(device))
