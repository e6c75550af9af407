"""How a process becomes one of the ranks that serve a model."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import distributed as dist

from sevenfold.config import StrictModel
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.precision import SnapshotDtype, StateDtype
from sevenfold.engine.quantised_weights import check_weights_device, exchange_weights
from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.worker import Worker, WorkerConfig
from sevenfold.models import HybridModel
from sevenfold.models.accounting import WeightFormat

_PATIENCE = timedelta(minutes=30)  # until the slowest rank has read its part


class Joining(StrictModel):
    """What a process needs to know to join.

    checkpoint: the folder. device: "cpu" or "cuda"; rank n takes GPU n. dtype: as torch names it;
        None keeps the file's. weights: which matrices to quantise, and to what; None none.
    store: a file that does not exist, by which the ranks meet.
    """

    checkpoint: str
    device: str
    dtype: str | None
    weights: WeightFormat | None
    rank: int
    num_ranks: int
    store: str


class Part(StrictModel):
    """The first rank's plan, from which each rank makes the same for its part of the model."""

    budget_bytes: int
    page_tokens: int
    state_dtype: StateDtype
    snapshot_dtype: SnapshotDtype
    ring_tokens: int
    host_bytes: int
    worker: WorkerConfig

    @classmethod
    def of(cls, plan: MemoryPlan, worker: WorkerConfig) -> Self:
        """Take what a plan was made from."""
        return cls(
            budget_bytes=plan.budget_bytes,
            page_tokens=plan.page_tokens,
            state_dtype=plan.state_dtype,
            snapshot_dtype=plan.snapshot_dtype,
            ring_tokens=plan.ring_tokens,
            host_bytes=plan.host_bytes,
            worker=worker,
        )

    def plan(self, model: HybridModel) -> MemoryPlan:
        """Make the plan again."""
        return plan_memory(
            model.config,
            budget_bytes=self.budget_bytes,
            context_tokens=1,
            page_tokens=self.page_tokens,
            state_dtype=self.state_dtype,
            snapshot_dtype=self.snapshot_dtype,
            kv_element_bytes=model.dtype.itemsize,
            ring_tokens=self.ring_tokens,
            host_bytes=self.host_bytes,
        )


@dataclass(frozen=True)
class Joined:
    """A rank's part of the model, and how the first rank speaks to it."""

    model: HybridModel
    channel: Channel

    def leave(self, worker: Worker | None) -> None:
        """Leave the default group, which join has made: on GPUs when all ranks do.

        Args:
            worker: of the model, which is closed first.
        """
        if worker is not None:
            worker.close()
        dist.destroy_process_group()

    def abandon(self) -> None:
        """Leave the default group without the others, who have gone in the middle of something.

        NCCL's kernels may wait for them on a GPU, and nothing that waits for these would end: the
        group is aborted, as destroying it would wait, too.
        """
        if self.model.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def join(joining: Joining) -> Joined:
    """Read this rank's part of the checkpoint, and meet the others.

    Raises:
        CheckpointError, UnsupportedError: as load_model.
        ConfigError: the number of ranks does not divide the model's sizes, or weights has no
            effect.
    """
    # Here, and not above: PyTorch's distributed tensors take as long to import as all the rest, and
    # nobody but a rank needs them.
    from sevenfold.parallel import Layout, ParallelConfig, load_divided_model

    parallel = ParallelConfig(tensor=joining.num_ranks)
    device = torch.device(joining.device)
    if device.type == "cuda":
        device = torch.device("cuda", joining.rank)
        torch.cuda.set_device(device)
    dtype = None if joining.dtype is None else getattr(torch, joining.dtype)
    exchange = None
    if joining.weights is not None:
        check_weights_device(joining.weights, device)
        exchange = partial(exchange_weights, weights=joining.weights)
    divided = load_divided_model(
        Path(joining.checkpoint),
        parallel,
        joining.rank,
        device=device,
        dtype=dtype,
        exchange=exchange,
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
            joining.store, joining.num_ranks
        ),
        rank=joining.rank,
        world_size=joining.num_ranks,
        timeout=_PATIENCE,
    )
    layout = Layout.join(parallel, device.type)
    ranks = layout.group("tensor")
    # NCCL connects at a group's first use: before memory is divided, and anything is recorded.
    dist.all_reduce(torch.zeros(1, device=device), group=ranks)
    return Joined(divided.connect(layout), Channel(ranks))
