"""What a rank's experts take at once: rows of its own, or rows that have come from others."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from sevenfold.models.feed_forward import Experts
from sevenfold.ops import Dispatch, autocast, grouped_swiglu, mixture, plan_dispatch
from sevenfold.parallel.collectives import gather_rows_of_ranks, sum_rows_of_ranks
from sevenfold.parallel.reading import sent


class Run(NamedTuple):
    """Rows of this rank's experts, and of its peers of expert_tensor beside them.

    sizes: rows of each rank of expert_tensor.
    how: where each expert's rows end, [E / expert] int32, where they are sorted; else how to sort
        them. One row that is none where there are none.
    """

    sizes: list[int]
    how: Tensor | Dispatch

    @staticmethod
    def of(counts: np.ndarray, device: torch.device, *, may_be_sorted: bool) -> "Run":
        """Say what rows are that come from source after source, each sorted by expert.

        Args:
            counts: [expert_tensor, sources, E / expert].
            device: of the rows.
            may_be_sorted: whether those of one source need no plan.
        """
        sizes, E = counts.sum((1, 2)).tolist(), counts.shape[-1]
        if not sum(sizes):
            # Experts without a token take a gradient of zero: their shards' reduction waits for it.
            counts = (np.arange(E) == 0)[None, None]
        if may_be_sorted and counts.shape[0] * counts.shape[1] == 1:
            return Run(sizes, *sent([counts.cumsum()], device))
        (each,) = sent([counts.ravel()], device)
        num_rows = max(1, sum(sizes))
        expert = torch.repeat_interleave(each.long(), output_size=num_rows) % E
        return Run(sizes, plan_dispatch(expert[:, None], E, None))

    @staticmethod
    def halves(rows_per_expert: Tensor) -> tuple[Tensor, Tensor]:
        """Say where experts end in both halves of sorted rows; the first is the smaller.

        Args:
            rows_per_expert: [E / expert] int32.

        Returns:
            [E / expert] int32 of each half.
        """
        ends = rows_per_expert.cumsum(0, dtype=torch.int32)
        first = torch.minimum(ends, ends[-1:] // 2)
        return first, ends - first


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
        sizes, how = run
        if len(sizes) > 1:
            rows = gather_rows_of_ranks(rows, sizes, self._width_peers)
        num_rows = len(rows)
        if not num_rows:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        done = self._run(rows, how)
        # A slice's gradient is a copy.
        done = done if num_rows else done[:0]
        return sum_rows_of_ranks(done, sizes, self._width_peers) if len(sizes) > 1 else done

    def _run(self, rows: Tensor, how: Tensor | Dispatch) -> Tensor:
        if not self.in_parts:
            assert isinstance(how, Dispatch)
            return self._experts(rows, rows.new_ones(len(rows), 1), how)
        gate_up, down = self._matrices
        if isinstance(how, Dispatch):
            return mixture(rows, rows.new_ones(len(rows), 1), gate_up, down, how)
        return grouped_swiglu(rows, gate_up, down, how)
