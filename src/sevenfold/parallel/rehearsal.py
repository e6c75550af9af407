"""A rank of any layout on one machine: the model divided without memory, the group a fake one."""

from dataclasses import dataclass

from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sevenfold.models import HybridModel, ModelConfig
from sevenfold.parallel.building import divided_on_meta
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.gradients import local
from sevenfold.parallel.layout import Layout


@dataclass(frozen=True)
class RankParameters:
    """What a rank holds: of each parameter by name, how many elements."""

    rank: int
    by_name: dict[str, int]

    @property
    def total(self) -> int:
        """Of all."""
        return sum(self.by_name.values())


def rehearse(config: ModelConfig, parallel: ParallelConfig, rank: int) -> RankParameters:
    """Build a rank's part of a model as a run would, without memory and without the other ranks.

    Args:
        config: of the whole model; its sizes suit the degrees.
        parallel: degrees.
        rank: which; 0 to parallel.num_ranks - 1.

    Returns:
        What it holds.

    Raises:
        RuntimeError: this process has joined a real group.
    """
    if dist.is_initialized():
        raise RuntimeError("rehearse must run outside of a process group, got one")
    dist.init_process_group("fake", rank=rank, world_size=parallel.num_ranks, store=FakeStore())
    try:
        model = divided_on_meta(config, Layout.join(parallel, "cpu"), between=_nothing)
    finally:
        dist.destroy_process_group()
    held = {name: local(parameter).numel() for name, parameter in model.named_parameters()}
    return RankParameters(rank, held)


def heaviest_rank(config: ModelConfig, parallel: ParallelConfig) -> RankParameters:
    """Return what the rank with the most parameters holds: the first of each pipeline's."""
    firsts = [stage * parallel.stage_ranks for stage in range(parallel.pipeline)]
    return max((rehearse(config, parallel, rank) for rank in firsts), key=lambda held: held.total)


def _nothing(model: HybridModel) -> None:
    return None
