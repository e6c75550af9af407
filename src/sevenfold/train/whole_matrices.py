"""Matrices that ranks divide, whole for a moment: what Muon needs of them."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from sevenfold.models import HybridModel
from sevenfold.optim import Parts
from sevenfold.optim.muon import UNDIVIDED
from sevenfold.parallel import Layout
from sevenfold.parallel.parts import joined_slices, parts_of, tensor_slice


def gathered(model: HybridModel, layout: Layout) -> Parts:
    """Return how a rank gathers the matrices of which it holds a part, and takes its part again.

    Args:
        model: what the rank holds, after fully_shard.
        layout: of the run.
    """
    if layout.is_alone:
        return UNDIVIDED
    parts = {parameter: parts_of(name) for name, parameter in model.named_parameters()}

    def width_of(parameter: nn.Parameter) -> int:
        if parts[parameter].tensor is None:
            return 1
        config = layout.config
        return config.expert_width if parts[parameter].is_expert else config.tensor

    def whole(x: Tensor, parameter: nn.Parameter) -> Tensor:
        x = x.full_tensor() if isinstance(x, DTensor) else x
        if width_of(parameter) == 1:
            return x
        slices = [torch.empty_like(x) for _ in range(width_of(parameter))]
        name = "expert_tensor" if parts[parameter].is_expert else "tensor"
        dist.all_gather(slices, x.contiguous(), group=layout.group(name))
        return joined_slices(slices, parts[parameter])

    def own(x: Tensor, parameter: nn.Parameter) -> Tensor:
        part, place = parts[parameter], layout.place
        index = place.expert_tensor if part.is_expert else place.tensor
        x = tensor_slice(x, part, index, width_of(parameter))
        if not isinstance(parameter, DTensor):
            return x
        # Every rank has computed the same, so nothing is sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(x, mesh, placements, src_data_rank=None)

    def shape(parameter: nn.Parameter) -> list[int]:
        sizes = list(parameter.shape)
        tensor = parts[parameter].tensor
        if tensor is not None:
            sizes[tensor] *= width_of(parameter)
        return sizes

    return Parts(whole, own, shape)
