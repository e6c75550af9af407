"""Where a process stands among the ranks of a run, and whom it speaks to."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sevenfold.config import ConfigError
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.copies import Copies
from sevenfold.parallel.exchange import Collective, Exchange

GroupName = Literal["pipeline", "context", "tensor", "expert", "expert_tensor", "routers"]


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank.

    data: which rows it reads, 0 to replicate * shard - 1.
    context: which stretch of them.
    tensor: which part of heads, widths and vocabulary.
    expert: which part of the experts.
    expert_tensor: which part of each expert's width.
    stage: which layers.
    """

    data: int
    context: int
    tensor: int
    expert: int
    expert_tensor: int = 0
    stage: int = 0


class Meshes(NamedTuple):
    """The same ranks, cut in several ways; tensor is innermost: what speaks most lies nearest.

    rows: (pipeline, data, context, tensor).
    tokens: (pipeline, tokens, tensor); tokens are data and context.
    shares: (shares, tensor); shares are pipeline and tokens.
    weights: (pipeline, replicate, weights, tensor); weights are shard and context.
    experts: (pipeline, replicate, expert_shard, expert, expert_tensor).
    routers: (pipeline, replicate, expert_shard, routers); routers are expert and expert_tensor.
    """

    rows: DeviceMesh
    tokens: DeviceMesh
    shares: DeviceMesh
    weights: DeviceMesh
    experts: DeviceMesh
    routers: DeviceMesh


_MESH_OF = {
    "pipeline": "rows",
    "context": "rows",
    "tensor": "rows",
    "expert": "experts",
    "expert_tensor": "experts",
    "routers": "routers",
}


@dataclass(frozen=True)
class Layout:
    """The meshes of a run, as one rank sees them; a run of one process has none."""

    config: ParallelConfig
    rank: int = 0
    meshes: Meshes | None = None

    @staticmethod
    def join(config: ParallelConfig, device_type: str) -> "Layout":
        """Build the meshes; every process of the default group calls it.

        Args:
            config: its degrees multiply to the group's size.
            device_type: "cpu" or "cuda".

        Raises:
            ConfigError: they do not.
        """
        size = dist.get_world_size() if dist.is_initialized() else 1
        check_num_ranks(config, size)
        if size == 1:
            return Layout(config)
        return Layout(config, dist.get_rank(), _meshes(config, device_type))

    @cached_property
    def place(self) -> Place:
        """Where this rank stands."""
        return place_of(self.config, self.rank)

    @property
    def is_alone(self) -> bool:
        """Whether the run has one process."""
        return self.meshes is None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what a run writes once."""
        return self.rank == 0

    def group(self, name: GroupName) -> dist.ProcessGroup:
        """The ranks along one dimension."""
        mesh: DeviceMesh = getattr(self._meshes(), _MESH_OF[name])
        return mesh.get_group(name)

    @cached_property
    def expert_exchange(self) -> Exchange:
        """How tokens travel between the ranks of expert, of all layers."""
        if self.config.expert_exchange == "copies":
            return Copies(self.group("expert"))
        return Collective(self.group("expert"))

    @cached_property
    def weight_copies(self) -> Copies:
        """Between the ranks of weight_mesh that divide weights."""
        return Copies(self._meshes().weights.get_group("weights"))

    @cached_property
    def expert_copies(self) -> Copies:
        """Between the ranks of expert_mesh that divide experts."""
        return Copies(self._meshes().experts.get_group("expert_shard"))

    @property
    def device_type(self) -> str:
        """Where the ranks' tensors lie: "cpu" or "cuda"."""
        return self._meshes().rows.device_type

    @property
    def weight_mesh(self) -> DeviceMesh:
        """Along which fully_shard divides weights, and copies them where replicate is not 1."""
        mesh = self._meshes().weights
        return mesh["weights"] if self.config.replicate == 1 else mesh["replicate", "weights"]

    @property
    def expert_mesh(self) -> DeviceMesh:
        """Along which fully_shard divides experts that ranks hold in part already."""
        mesh, name = self._meshes().experts, "expert_shard"
        return mesh[name] if self.config.replicate == 1 else mesh["replicate", name]

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold different tokens."""
        if self.meshes is None:
            return values
        return _reduced(values, self.meshes.tokens.get_group("tokens"))

    def sum_over_shares(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold different tokens or different layers."""
        if self.meshes is None:
            return values
        return _reduced(values, self.meshes.shares.get_group("shares"))

    def sum_over_all(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        return values if self.meshes is None else _reduced(values, None)

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so: all ranks hear the same."""
        return bool(self.sum_over_all(torch.tensor(int(flag))).item())

    def _meshes(self) -> Meshes:
        if self.meshes is None:
            raise ValueError("layout must have several processes to have a mesh, got one")
        return self.meshes


def _reduced(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values


def check_num_ranks(config: ParallelConfig, num_processes: int) -> None:
    """Raise ConfigError unless the degrees multiply to the number of processes."""
    if config.num_ranks != num_processes:
        start = f"torchrun --nproc-per-node {config.num_ranks} --no-python sevenfold train"
        raise ConfigError(
            f"parallel: pipeline * replicate * shard * context * tensor must be the number of "
            f"processes of the run, {num_processes}, got {config.pipeline} * {config.replicate} * "
            f"{config.shard} * {config.context} * {config.tensor} = {config.num_ranks}; on one "
            f"node `{start}` starts as many"
        )


def place_of(config: ParallelConfig, rank: int) -> Place:
    """Return where a rank stands: tensor innermost, then context, shard, replicate, pipeline."""
    stage, within = divmod(rank, config.stage_ranks)
    outer, tensor = divmod(within, config.tensor)
    data, context = divmod(outer, config.context)
    expert, expert_tensor = divmod(within, config.expert_width)
    return Place(data, context, tensor, expert % config.expert, expert_tensor, stage)


def _meshes(config: ParallelConfig, device_type: str) -> Meshes:
    c = config
    experts = {
        "pipeline": c.pipeline,
        "replicate": c.replicate,
        "expert_shard": c.expert_shards,
    }
    within = {"expert": c.expert, "expert_tensor": c.expert_width}
    shapes: tuple[dict[str, int], ...] = (
        {"pipeline": c.pipeline, "data": c.data, "context": c.context, "tensor": c.tensor},
        {"pipeline": c.pipeline, "tokens": c.token_ranks, "tensor": c.tensor},
        {"shares": c.pipeline * c.token_ranks, "tensor": c.tensor},
        {
            "pipeline": c.pipeline,
            "replicate": c.replicate,
            "weights": c.weight_shards,
            "tensor": c.tensor,
        },
        experts | within,
        experts | {"routers": c.expert * c.expert_width},
    )
    return Meshes(
        *(
            init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))
            for shape in shapes
        )
    )
