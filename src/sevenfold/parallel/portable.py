"""Tensors that each rank holds in part, as PyTorch's checkpoints know them: whole by name.

A checkpoint written under one layout is read under any other, one process included: what is stored
is the whole tensor, and each rank writes and reads its part of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from sevenfold.parallel.gradients import local
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import ParameterParts, by_halves, held_parts


def portable(name: str, held: Tensor, layout: Layout) -> Tensor:
    """View what a rank holds of a parameter, or of a moment of it, as a part of the whole.

    Args:
        name: of the parameter.
        held: with its shape on this rank.
        layout: of the run.

    Returns:
        A view: loading into it changes `held`. Gate and up are apart, [..., 2, F, ...].
    """
    parts = held_parts(name, held)
    part = by_halves(local(held.detach()), parts)
    if layout.is_alone:
        return part
    mesh, placements, factors = _placed(parts, part.dim(), layout)
    shape = [size * factor for size, factor in zip(part.shape, factors, strict=True)]
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _placed(
    parts: ParameterParts, num_dims: int, layout: Layout
) -> tuple[DeviceMesh, list[Placement], list[int]]:
    """Mesh, its placements, and into how many parts each dimension is divided."""
    c, place = layout.config, layout.place
    # Of the experts' ranks some hold what others hold of a dense weight: each has its own order.
    experts, width, shards = (
        (c.expert, c.expert_width, c.expert_shards)
        if parts.is_expert
        else (1, c.tensor, c.weight_shards)
    )
    # A weight lies on the ranks of its stage alone.
    ranks = torch.arange(c.num_ranks).view(c.pipeline, c.replicate, shards, experts, width)
    # Tensor before weights: where both divide one dimension, tensor did so first.
    mesh = DeviceMesh(
        layout.device_type,
        ranks[place.stage].permute(0, 2, 3, 1),
        mesh_dim_names=("replicate", "expert", "tensor", "weights"),
        _init_backend=False,
        _rank=layout.rank,
    )
    shift = int(parts.has_halves)
    tensor = None if parts.tensor is None else parts.tensor + shift
    after = parts.tensor is not None and parts.weights > parts.tensor
    weights = parts.weights + (shift if after else 0)
    factors = [1] * num_dims
    placements: list[Placement] = [Replicate(), Replicate(), Replicate(), Shard(weights)]
    factors[weights] *= shards
    if parts.is_expert:
        placements[1] = Shard(0)
        factors[0] *= experts
    if tensor is not None:
        placements[2] = Shard(tensor)
        factors[tensor] *= width
    return mesh, placements, factors


def portable_tensors(tensors: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """View a run's weights and moments so that any layout can read them.

    Args:
        tensors: "model": name to parameter; "optimizer": name to its state; what else there is
            stays as it is.
        layout: of the run.
    """
    model = {name: portable(name, x, layout) for name, x in tensors["model"].items()}
    moments = {
        name: {key: x if x.dim() == 0 else portable(name, x, layout) for key, x in state.items()}
        for name, state in tensors["optimizer"].items()
    }
    return {**tensors, "model": model, "optimizer": moments}
