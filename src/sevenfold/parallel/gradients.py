"""Norm and clipping of gradients of which each rank holds a part."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import ParameterParts, parts_of


@torch.no_grad()
def gradient_norm(named_parameters: Iterable[tuple[str, nn.Parameter]], layout: Layout) -> Tensor:
    """Return the global 2-norm of the gradients, the same on all ranks.

        norm = sqrt(sum over ranks and parameters of |own part|^2 / copies)

    copies is the number of ranks that hold the same part, so each element counts once, be it
    divided by tensor, by expert, by both or by neither.

    Args:
        named_parameters: under their names in HybridModel.
        layout: how they are divided.

    Returns:
        A scalar on the device.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            alike = by_copies.setdefault(copies(parts_of(name), layout), [])
            alike.append(local(parameter.grad))
    # One operation for all: the host launches each, and there are hundreds of parameters.
    squares = [_square_sum(grads) / held_by for held_by, grads in by_copies.items()]
    return layout.sum_over_all(torch.stack(squares).sum()).sqrt()


def _square_sum(grads: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients so that their norm is at most limit, as torch.nn.utils does.

    g = g * min(1, limit / (norm + 1e-6))
    """
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    alike = [grad for grad in grads if grad.dtype is scale.dtype]
    if alike:
        torch._foreach_mul_(alike, scale)  # pyright: ignore[reportPrivateImportUsage]
    for grad in grads:
        if grad.dtype is not scale.dtype:
            grad.mul_(scale)


def copies(parts: ParameterParts, layout: Layout) -> int:
    """How many ranks hold the same part of a parameter."""
    config = layout.config
    # Of experts the layout has no copies but replicate's: see ParallelConfig.expert_shards.
    return config.replicate * (config.tensor if parts.tensor is None else 1)


def local(x: Tensor) -> Tensor:
    """What this rank holds of x."""
    return x.to_local() if isinstance(x, DTensor) else x


def groups_by_mesh(groups: list[dict]) -> list[dict]:
    """Part an optimizer's groups so that the parameters of each lie on one mesh.

    PyTorch's fused optimizers refuse tensors of several meshes in one call.
    """
    parted = []
    for group in groups:
        meshes = {_mesh(parameter): [] for parameter in group["params"]}
        for parameter in group["params"]:
            meshes[_mesh(parameter)].append(parameter)
        parted += [{**group, "params": parameters} for parameters in meshes.values()]
    return parted


def _mesh(parameter: nn.Parameter) -> object:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None
