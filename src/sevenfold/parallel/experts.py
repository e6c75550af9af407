"""Expert parallelism: each rank holds some experts, or some of their width; tokens travel there.

    ranks of a stage = replicate * copies of the experts * expert * expert_tensor

beside the dense layers' replicate * shard * context * tensor: a layout of their own. The router is
global: an expert's capacity is shared over the expert * expert_tensor ranks that hold one copy of
the experts before any token is dropped, in the tokens' order; so a group drops what one process
with all its tokens would.

Source: arXiv 2501.08313 section 2.2.2 (global router), 3.1 (groups, overlap).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.models.padding import Padding
from sevenfold.ops import (
    Dispatch,
    autocast,
    combine_parts,
    gather_parts,
    gather_rows,
    plan_dispatch,
)
from sevenfold.parallel.capacity import limited, order_of_pieces, share_capacity
from sevenfold.parallel.collectives import Flight, begin_exchange, end_exchange
from sevenfold.parallel.context.cut import NUM_STRETCHES
from sevenfold.parallel.expert_runs import ExpertRuns, Run
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import parts_of, tensor_slice
from sevenfold.parallel.reading import Reading
from sevenfold.parallel.shared_tokens import SharedTokens


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


class _Choices(NamedTuple):
    """Choices that all ranks' tokens made, and those that are kept: [ranks, pieces, E]."""

    made: np.ndarray
    kept: np.ndarray


class _LaidOut(NamedTuple):
    """A token group before it departs.

    plan, rows: of all its rows, sorted by expert, this rank's experts first.
    ends: where its experts' rows end in both halves of those that stay; none unless they are run in
        halves.
    """

    plan: Dispatch
    rows: Tensor
    ends: tuple[Tensor, ...]


class _Underway(NamedTuple):
    """A token group on its way to the experts.

    plan: of all its rows.
    early, late: rows that stay: those to compute while rows come, and while what became of those
        goes back; or all and none, to compute with those that come.
    ends: of early and late.
    rows: those that come, by the flight.
    counts: [expert_tensor, sources, E / expert] of what comes, and of what is computed with it.
    """

    plan: Dispatch
    early: Tensor
    late: Tensor
    ends: tuple[Tensor, ...]
    rows: Tensor
    flight: Flight
    counts: np.ndarray


class ExpertRoute:
    """Stands in for MixtureOfExperts.routed where tokens travel to their experts.

    Ranks of tensor parallelism hold the same tokens, and each sends its part of them. What a rank
    has for its own experts stays: one half of it is computed while the others' rows come, the other
    while what became of those goes back. Token groups follow one another: one travels while the
    experts run on the one before. Once a layer the host waits for the counts of choices, which the
    exchange needs there, while the device sorts the tokens.
    """

    def __init__(self, moe: MixtureOfExperts, layout: Layout) -> None:
        config = layout.config
        self.experts, self.capacity = moe.experts, moe.capacity
        self.num_experts, self.num_chosen = moe.moe.num_local_experts, moe.moe.num_experts_per_tok
        self.place, self.size = layout.place, (config.expert, config.expert_width)
        self.routers, self.exchange = layout.group("routers"), layout.expert_exchange
        self.width_peers = layout.group("expert_tensor")
        self.copies = layout.group("tensor") if config.tensor > 1 else None
        self.stretches = NUM_STRETCHES if config.context > 1 else 1
        self.num_groups = config.expert_token_groups
        self.order = order_of_pieces(config, layout.place, self.num_groups)
        own = self.place.expert
        self.others = [rank for rank in range(config.expert) if rank != own]
        every = np.arange(self.num_experts).reshape(config.expert, -1)
        self.own_first = every[[own, *self.others]].ravel()

    @property
    def index(self) -> int:
        """This rank among those that share an expert's capacity."""
        return self.place.expert * self.size[1] + self.place.expert_tensor

    def __call__(
        self, tokens: Tensor, weights: Tensor, experts: Tensor, padding: Padding | None = None
    ) -> tuple[Tensor, Tensor]:
        """Send tokens [T, D] to their experts [T, k]: their sum by weights, and choices kept."""
        # The experts would cast their rows: those are k times as many, and travel.
        (tokens,) = autocast(tokens)
        sizes, shared = self._sizes(len(tokens), padding), None
        if self.copies is not None:
            shared = SharedTokens(sizes, self.copies)
            sizes = shared.own_sizes
            tokens, weights, experts = (shared.split(x) for x in (tokens, weights, experts))
        pieces = self._pieces(sizes)
        reading = self._counts(experts, pieces)
        parts = map(pieces.split, (tokens, weights, experts))
        groups = [_Group(*group) for group in zip(pieces.groups, *parts, strict=True)]
        runs = ExpertRuns(self.experts, self.width_peers, self.size[1])
        # The first group's rows are laid out while the host waits for the counts.
        ready = self._ready(groups[0], runs)
        choices = self._limited(reading.numbers())
        underway, returning = self._depart(groups[0], ready, choices, runs), []
        for after in (*groups[1:], None):
            now = underway
            early = _run(runs, now.early, now.ends[:1])
            arriving = Run.of(now.counts, now.rows.device, may_be_sorted=runs.in_parts)
            arrived = end_exchange(now.rows, now.flight)
            if after is not None:
                ready = self._ready(after, runs)
                underway = self._depart(after, ready, choices, runs)
            joining = [] if now.ends else [early]
            *joined, done = _run_together(runs, [*joining, arrived], arriving)
            back = Flight(now.flight.received, now.flight.sent, self.exchange)
            rows = begin_exchange(done, back)
            late = _run(runs, now.late, now.ends[1:])
            returning.append((now.plan, joined[0] if joined else early, late, rows, back))
        sums = []
        for group, (plan, early, late, rows, back) in zip(groups, returning, strict=True):
            # Also where none went: every rank's gradient goes back, and one that has none answers.
            parts = (early, late, end_exchange(rows, back))
            sums.append(combine_parts(parts, group.weights.to(rows.dtype), plan))
        kept = [plan.rows_per_expert for plan, *_ in returning]
        return self._on_all(_cat(sums), _cat(kept), shared)

    def _on_all(
        self, y: Tensor, kept: Tensor, shared: SharedTokens | None
    ) -> tuple[Tensor, Tensor]:
        if shared is None:
            return y, kept
        kept = kept.clone()
        dist.all_reduce(kept, group=shared.group)
        return shared.join(y), kept

    def _sizes(self, num_tokens: int, padding: Padding | None) -> tuple[int, ...]:
        """Tokens of each stretch."""
        if padding is not None:
            return padding.tokens_of(self.stretches)
        return (num_tokens // self.stretches,) * self.stretches

    def _pieces(self, sizes: tuple[int, ...]) -> _Pieces:
        pieces = []
        for size, rest in (divmod(size, self.num_groups) for size in sizes):
            pieces += [size + (n < rest) for n in range(self.num_groups)]
        return _Pieces(tuple(pieces), self.stretches)

    def _counts(self, experts: Tensor, pieces: _Pieces) -> Reading:
        """[ranks, pieces, E] int64: choices."""
        every = torch.arange(self.num_experts, device=experts.device)
        own = [(x.reshape(-1, 1) == every).sum(0) for x in experts.split(list(pieces.sizes))]
        gathered = experts.new_empty(len(self.order) // len(own), len(own), self.num_experts)
        dist.all_gather_into_tensor(gathered, torch.stack(own)[None], group=self.routers)
        return Reading(gathered)

    @property
    def may_drop(self) -> bool:
        """Whether an expert takes a limited number of rows."""
        return self.experts.training and self.capacity(1) is not None

    def _limited(self, counts: np.ndarray) -> _Choices:
        """Share the capacity over all choices [ranks, pieces, E]."""
        # Of all ranks' tokens, whose number the choices tell: padding has none.
        capacity = self.capacity(int(counts.sum()) // self.num_chosen)
        if not self.may_drop or capacity is None:
            return _Choices(counts, counts)
        flat = counts.reshape(-1, self.num_experts)
        kept = np.empty_like(flat)
        kept[self.order] = share_capacity(flat[self.order], capacity)
        return _Choices(counts, kept.reshape(counts.shape))

    def _ready(self, group: _Group, runs: ExpertRuns) -> Dispatch | _LaidOut:
        """Sort a token group's choices, and lay its rows out unless some may be dropped."""
        plan = plan_dispatch(self._renamed(group.experts), self.num_experts, None)
        return plan if self.may_drop else self._laid_out(group, plan, runs)

    def _laid_out(self, group: _Group, plan: Dispatch, runs: ExpertRuns) -> _LaidOut:
        # Before it is known which of them stay: gather_parts says so, and has their gradients.
        with torch.no_grad():
            rows = gather_rows(group.tokens, plan)
        own = plan.rows_per_expert[: self.num_experts // self.size[0]]
        return _LaidOut(plan, rows, Run.halves(own) if runs.in_parts else ())

    def _renamed(self, experts: Tensor) -> Tensor:
        """Call this rank's experts the first: the rows that travel then lie end to end."""
        own = self.num_experts // self.size[0]
        end = (self.place.expert + 1) * own
        if end == own:
            return experts
        return torch.where(experts < end, (experts + own) % end, experts)

    def _depart(
        self, group: _Group, ready: Dispatch | _LaidOut, choices: _Choices, runs: ExpertRuns
    ) -> _Underway:
        """Send a token group on its way."""
        if isinstance(ready, Dispatch):
            made, kept = (x[self.index, group.pieces][:, self.own_first] for x in choices)
            ready = self._laid_out(group, limited(ready, made, kept), runs)
        plan, rows, ends = ready
        by_rank = choices.kept[:, group.pieces].sum(1).reshape(*self.size, self.size[0], -1)
        own, part = self.place.expert, self.place.expert_tensor
        mine = by_rank[:, :, own].swapaxes(0, 1)  # [expert_tensor, expert, E / expert]
        sent, received = by_rank[own, part].sum(-1).tolist(), mine[part].sum(-1).tolist()
        stay = sent[own]
        sent[own] = received[own] = 0  # what stays is no part of the exchange
        flight = Flight(sent, received, self.exchange)
        flight.start(rows[stay:], sent, received)
        # The graph is told of it while the rows travel.
        early = stay // 2 if ends else stay
        sizes = (early, stay - early, len(rows) - stay)
        first, second, leaving = gather_parts(group.tokens, rows, plan, sizes)
        underway = begin_exchange(leaving, flight)
        sources = self.others if ends else [own, *self.others]
        return _Underway(plan, first, second, ends, underway, flight, mine[:, sources])


def _run(runs: ExpertRuns, rows: Tensor, ends: tuple[Tensor, ...]) -> Tensor:
    """What the experts make of rows that stay; of none, and of those that wait, themselves."""
    return runs(rows, Run([len(rows)], *ends)) if ends and len(rows) else rows


def _run_together(runs: ExpertRuns, parts: list[Tensor], run: Run) -> tuple[Tensor, ...]:
    """What the experts make of several rows at once, apart again."""
    done = runs(_cat(parts), run)
    return done.split([len(part) for part in parts]) if len(parts) > 1 else (done,)


def _cat(parts: list[Tensor]) -> Tensor:
    """Join parts; one alone is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
