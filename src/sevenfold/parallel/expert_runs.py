"""What a rank's experts take at once: rows of its own, or rows that have come from others."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from sevenfold.models.feed_forward import Experts
from sevenfold.ops import Dispatch, autocast, grouped_swiglu, mixture, plan_dispatch
from sevenfold.parallel.capacity import share_capacity
from sevenfold.parallel.collectives import gather_rows_of_ranks, sum_rows_of_ranks
from sevenfold.parallel.reading import sent


class Run(NamedTuple):
    """Rows of this rank's experts, and of its peers of expert_tensor beside them.

    sizes: rows of each rank of expert_tensor. per_expert: [E / expert] of all of them, int32.
    plan: how to sort them, one row that is none where there are none; None if they are sorted.
    """

    sizes: list[int]
    per_expert: Tensor
    plan: Dispatch | None

    @staticmethod
    def of(counts: Tensor, device: torch.device, *, may_be_sorted: bool) -> "Run":
        """Say what rows are, sorted by source and then by expert.

        Args:
            counts: [expert_tensor, sources, E / expert] on the host.
            device: of the rows.
            may_be_sorted: whether those of one source need no plan.
        """
        sizes, E = counts.sum((1, 2)).tolist(), counts.shape[-1]
        per_expert = counts.sum((0, 1))
        if not sum(sizes):
            # Experts without a token take a gradient of zero: their shards' reduction waits for it.
            per_expert = (torch.arange(E) == 0).to(counts.dtype)
        on_device = sent(per_expert.to(torch.int32), device)
        if may_be_sorted and counts.shape[0] * counts.shape[1] <= 1:
            return Run(sizes, on_device, None)
        if not sum(sizes):
            expert = torch.zeros(1, dtype=torch.int64, device=device)
        else:
            local = torch.arange(E, device=device).repeat(counts.numel() // E)
            each = sent(counts.flatten(), device)
            expert = torch.repeat_interleave(local, each, output_size=sum(sizes))
        return Run(sizes, on_device, plan_dispatch(expert[:, None], E, None))

    @staticmethod
    def halves(counts: Tensor, device: torch.device) -> list["Run"]:
        """Say what both halves of one source's rows are; counts [E / expert] on the host."""
        first = share_capacity(counts[:, None], int(counts.sum()) // 2)[:, 0]
        halves = (first, counts - first)
        return [Run.of(half[None, None], device, may_be_sorted=True) for half in halves]


class ExpertRuns:
    """Runs the experts of a layer, for one call of it.

    in_parts: whether they may run several times. fully_shard gathers the weights for each call of a
        module, and ranks of expert_tensor speak in each: there all rows are computed at once.
    """

    def __init__(self, experts: Experts, width_peers: dist.ProcessGroup, width: int) -> None:
        """Cast the weights once for all runs, where there may be several."""
        self._experts, self._width_peers = experts, width_peers
        self.in_parts = width == 1 and not isinstance(experts, FSDPModule)
        self._matrices: tuple[Tensor, ...] = ()
        if self.in_parts:
            self._matrices = autocast(experts.gate_up_proj, experts.down_proj)

    def __call__(self, rows: Tensor, run: Run) -> Tensor:
        """Run rows that come from rank after rank, sorted by expert within each: the same order."""
        sizes, per_expert, plan = run
        if len(sizes) > 1:
            rows = gather_rows_of_ranks(rows, sizes, self._width_peers)
        num_rows = len(rows)
        if not num_rows:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if plan is None:
            done = grouped_swiglu(rows, *self._matrices, per_expert)
        elif self.in_parts:
            done = mixture(rows, rows.new_ones(len(rows), 1), *self._matrices, plan)
        else:
            done = self._experts(rows, rows.new_ones(len(rows), 1), plan)
        # A slice's gradient is a copy.
        done = done if num_rows else done[:0]
        return sum_rows_of_ranks(done, sizes, self._width_peers) if len(sizes) > 1 else done
