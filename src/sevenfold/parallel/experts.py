"""Expert parallelism: each rank holds some experts, or some of their width; tokens travel there.

    ranks of a stage = replicate * copies of the experts * expert * expert_tensor

beside the dense layers' replicate * shard * context * tensor: a layout of their own. The router is
global: an expert's capacity is shared over the expert * expert_tensor ranks that hold one copy of
the experts before any token is dropped, in the tokens' order; so a group drops what one process
with all its tokens would.

Source: arXiv 2501.08313 section 2.2.2 (global router), 3.1 (groups, overlap).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.ops import Dispatch, autocast, combine, gather_rows, plan_dispatch
from sevenfold.parallel.collectives import (
    Flight,
    begin_exchange,
    end_exchange,
    gather_rows_of_ranks,
    join_tokens,
    split_tokens,
    sum_rows_of_ranks,
)
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.context.cut import NUM_STRETCHES
from sevenfold.parallel.layout import Layout, Place
from sevenfold.parallel.parts import parts_of, tensor_slice


def divide_experts(moe: MixtureOfExperts, layout: Layout) -> None:
    """Keep this rank's part of the experts, and send tokens to the ranks that hold theirs.

    Args:
        moe: changed in place; names stay, the stacked weights have fewer experts of less width.
        layout: whose config routes tokens.
    """
    place, config = layout.place, layout.config
    for name in ("gate_up_proj", "down_proj"):
        weight, parts = getattr(moe.experts, name), parts_of(f"experts.{name}")
        own = weight.data.chunk(config.expert)[place.expert]
        own = tensor_slice(own, parts, place.expert_tensor, config.expert_width)
        weight.data = own.clone(memory_format=torch.contiguous_format)
    moe.routed = ExpertRoute(moe, layout)  # pyright: ignore[reportAttributeAccessIssue]


class _Pieces(NamedTuple):
    """How a rank's tokens are parted: into token groups, each of pieces in the tokens' order."""

    sizes: tuple[int, ...]
    per_group: int

    @property
    def groups(self) -> list[slice]:
        """Pieces of each token group."""
        starts = range(0, len(self.sizes), self.per_group)
        return [slice(first, first + self.per_group) for first in starts]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Part x [T, ...] into the token groups."""
        # Not slice by slice: the gradient of each would be as large as the whole.
        sizes = [sum(self.sizes[group]) for group in self.groups]
        return x.split(sizes) if len(sizes) > 1 else (x,)


class _Group(NamedTuple):
    """A token group: its pieces, its tokens [n, D], and their weights and experts [n, k]."""

    pieces: slice
    tokens: Tensor
    weights: Tensor
    experts: Tensor


class _Ready(NamedTuple):
    """A token group before it departs: its plan, and the rows unless some may be dropped."""

    plan: Dispatch
    rows: Tensor | None


class _Arriving(NamedTuple):
    """The rows that this rank's experts take, and its peers' of expert_tensor beside them.

    sizes: rows that arrive at each rank of expert_tensor.
    plan: of all of them; of one row that is none where there are none.
    """

    sizes: list[int]
    plan: Dispatch


class _Underway(NamedTuple):
    """A token group on its way to the experts."""

    plan: Dispatch
    rows: Tensor
    flight: Flight
    arriving: _Arriving


class ExpertRoute:
    """Stands in for MixtureOfExperts.routed where tokens travel to their experts.

    Ranks of tensor parallelism hold the same tokens, and each sends its part of them. Token groups
    follow one another: one travels while the experts run on the one before, and their results
    travel back while they run on the next. Once a layer the host waits for the counts of choices,
    which the exchange needs there, while the device sorts the tokens.
    """

    def __init__(self, moe: MixtureOfExperts, layout: Layout) -> None:
        config = layout.config
        self.experts, self.capacity = moe.experts, moe.capacity
        self.num_experts = moe.moe.num_local_experts
        self.place, self.size = layout.place, (config.expert, config.expert_width)
        self.routers, self.peers = layout.group("routers"), layout.group("expert")
        self.width_peers = layout.group("expert_tensor")
        self.copies = layout.group("tensor") if config.tensor > 1 else None
        self.stretches = NUM_STRETCHES if config.context > 1 else 1
        self.num_groups = config.expert_token_groups
        self.order = order_of_pieces(config, layout.place, self.num_groups)

    @property
    def index(self) -> int:
        """This rank among those that share an expert's capacity."""
        return self.place.expert * self.size[1] + self.place.expert_tensor

    def __call__(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Send tokens [T, D] to their experts [T, k]: their sum by weights, and choices kept."""
        # The experts would cast their rows: those are k times as many, and travel.
        (tokens,) = autocast(tokens)
        if self.copies is not None:
            tokens, weights, experts = (
                split_tokens(x, self.copies, self.stretches) for x in (tokens, weights, experts)
            )
        pieces = self._pieces(len(tokens))
        reading, capacity = self._counts(experts, pieces), self._capacity(len(tokens))
        parts = map(pieces.split, (tokens, weights, experts))
        groups = [_Group(*group) for group in zip(pieces.groups, *parts, strict=True)]
        # The first group's rows are sorted while the host waits for the counts.
        ready = self._ready(groups[0], capacity)
        counts = reading.numbers()
        quotas = self._quotas(counts, capacity)
        underway, returning = self._depart(groups[0], ready, counts, quotas), []
        for after in (*groups[1:], None):
            arrived = underway
            if after is not None:
                underway = self._depart(after, self._ready(after, capacity), counts, quotas)
            done = self._run_experts(end_exchange(arrived.rows, arrived.flight), arrived.arriving)
            back = Flight(arrived.flight.received, arrived.flight.sent, self.peers)
            returning.append((arrived.plan, begin_exchange(done, back), back))
        sums = [
            combine(end_exchange(rows, back), group.weights.to(rows.dtype), plan)
            for group, (plan, rows, back) in zip(groups, returning, strict=True)
        ]
        kept = [plan.rows_per_expert for plan, _, _ in returning]
        return self._joined(_cat(sums), _cat(kept))

    def _joined(self, y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        if self.copies is None:
            return y, kept
        kept = kept.clone()
        dist.all_reduce(kept, group=self.copies)
        return join_tokens(y, self.copies, self.stretches), kept

    def _pieces(self, num_tokens: int) -> _Pieces:
        size, rest = divmod(num_tokens // self.stretches, self.num_groups)
        of_stretch = [size + (n < rest) for n in range(self.num_groups)]
        return _Pieces(tuple(of_stretch * self.stretches), self.stretches)

    def _counts(self, experts: Tensor, pieces: _Pieces) -> "_Reading":
        """[ranks, pieces, E] int64: choices."""
        every = torch.arange(self.num_experts, device=experts.device)
        own = [(x.reshape(-1, 1) == every).sum(0) for x in experts.split(list(pieces.sizes))]
        gathered = experts.new_empty(len(self.order) // len(own), len(own), self.num_experts)
        dist.all_gather_into_tensor(gathered, torch.stack(own)[None], group=self.routers)
        return _Reading(gathered)

    def _capacity(self, num_tokens: int) -> int | None:
        """Rows that an expert takes of all ranks' tokens; None is any number."""
        if not self.experts.training:
            return None
        return self.capacity(num_tokens * self.size[0] * self.size[1])

    def _quotas(self, counts: Tensor, capacity: int | None) -> Tensor:
        """[ranks, pieces, E]: choices that are kept."""
        if capacity is None:
            return counts
        quotas = torch.empty_like(counts).flatten(0, 1)
        quotas[self.order] = share_capacity(counts.flatten(0, 1)[self.order], capacity)
        return quotas.view_as(counts)

    def _ready(self, group: _Group, capacity: int | None) -> _Ready:
        plan = plan_dispatch(group.experts, self.num_experts, None)
        return _Ready(plan, gather_rows(group.tokens, plan) if capacity is None else None)

    def _depart(self, group: _Group, ready: _Ready, counts: Tensor, quotas: Tensor) -> _Underway:
        """Send a token group on its way, and sort what arrives before it has arrived."""
        pieces, plan, rows = group.pieces, ready.plan, ready.rows
        if rows is None:
            plan = limited(plan, counts[self.index, pieces], quotas[self.index, pieces])
            rows = gather_rows(group.tokens, plan)
        by_rank = quotas[:, pieces].sum(1).view(*self.size, self.size[0], -1)
        expert, part = self.place.expert, self.place.expert_tensor
        own = by_rank[:, :, expert]  # [expert, expert_tensor, E / expert]
        sent, received = by_rank[expert, part].sum(-1).tolist(), own[:, part].sum(-1).tolist()
        flight = Flight(sent, received, self.peers)
        underway = begin_exchange(rows, flight)
        return _Underway(plan, underway, flight, _arriving(own.transpose(0, 1), rows.device))

    def _run_experts(self, arrived: Tensor, arriving: _Arriving) -> Tensor:
        """Run rows that come from rank after rank, sorted by expert within each: the same order."""
        sizes, plan = arriving
        if len(sizes) > 1:
            arrived = gather_rows_of_ranks(arrived, sizes, self.width_peers)
        num_rows = len(arrived)
        if not num_rows:
            arrived = torch.cat([arrived, arrived.new_zeros(1, arrived.shape[1])])
        done = self.experts(arrived, arrived.new_ones(len(arrived), 1), plan)
        # A slice's gradient is a copy.
        done = done if num_rows else done[:0]
        return sum_rows_of_ranks(done, sizes, self.width_peers) if len(sizes) > 1 else done


def _arriving(counts: Tensor, device: torch.device) -> _Arriving:
    """Plan rows by their counts [expert_tensor, expert, E / expert] on the host."""
    sizes, E = counts.sum((1, 2)).tolist(), counts.shape[-1]
    local = torch.arange(E, device=device).repeat(counts.numel() // E)
    each = _sent(counts.flatten(), device)
    expert = torch.repeat_interleave(local, each, output_size=sum(sizes))
    # Experts without a token take a gradient of zero: their shards' reduction waits for it.
    expert = expert if sum(sizes) else expert.new_zeros(1)
    return _Arriving(sizes, plan_dispatch(expert[:, None], E, None))


def _cat(parts: list[Tensor]) -> Tensor:
    """Join parts; one alone is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Reading:
    """Numbers on their way to the host, from where the device's work stands."""

    def __init__(self, x: Tensor) -> None:
        self.event, self.host = None, x
        if x.device.type == "cuda":
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def numbers(self) -> Tensor:
        """Wait for them, and not for what the device was given since."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy from the host; from pinned memory, or the copy would wait for all work before it."""
    if device.type != "cuda":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def order_of_pieces(config: ParallelConfig, place: Place, num_groups: int) -> list[int]:
    """Sort all pieces of the ranks that share an expert's capacity by their tokens' order.

    Args:
        config: degrees.
        place: of one of the ranks.
        num_groups: token groups of each rank; each has a piece of every stretch.

    Returns:
        Indices into [ranks, stretches, token groups], flat, the first tokens first.
    """
    size = config.expert * config.expert_width
    weights = place.data % config.shard * config.context + place.context
    first = (weights * config.tensor + place.tensor) // size * size
    keys = []
    for rank in range(first, first + size):
        row, tensor = divmod(rank, config.tensor)
        data, context = divmod(row, config.context)
        stretches = (context, 2 * config.context - 1 - context) if config.context > 1 else (0,)
        keys += [(data, s, tensor, n) for s in stretches for n in range(num_groups)]
    return sorted(range(len(keys)), key=keys.__getitem__)


def share_capacity(counts: Tensor, capacity: int) -> Tensor:
    """Give each expert's capacity to the pieces in their order.

        quota_p = min(count_p, max(0, capacity - sum over q < p of count_q))

    Args:
        counts: [pieces, E] choices, in the tokens' order.
        capacity: rows that one expert takes in the whole group.

    Returns:
        [pieces, E].
    """
    earlier = counts.cumsum(0) - counts
    return torch.minimum(counts, (capacity - earlier).clamp(min=0))


def limited(plan: Dispatch, counts: Tensor, quota: Tensor) -> Dispatch:
    """Keep the first choices of each expert in each piece.

    Args:
        plan: of all choices.
        counts: [pieces, E] on the host; choices of each expert in the tokens' pieces.
        quota: [pieces, E] on the host; how many of them stay, the first.
    """
    if torch.equal(counts, quota):
        return plan
    device, R = plan.choice.device, len(plan.choice)
    # The plan is sorted by expert, and within an expert by token: piece after piece.
    by_expert, stay = counts.t().flatten(), quota.t().flatten()
    first = torch.repeat_interleave(by_expert.cumsum(0) - by_expert, by_expert)
    stays = torch.arange(R) - first < torch.repeat_interleave(stay, by_expert)
    choice = plan.choice[_sent(torch.nonzero(stays).flatten(), device)]
    row = torch.full((plan.row.numel(),), len(choice), device=device)
    row[choice] = torch.arange(len(choice), device=device)
    rows_per_expert = _sent(quota.sum(0).to(torch.int32), device)
    return Dispatch(choice, row.view(plan.row.shape), rows_per_expert)
