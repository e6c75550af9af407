"""Which dimension of each parameter is divided, and by whom.

Every matrix has one side of hidden_size, which fully_shard can always divide, and one of heads,
width or vocabulary, which tensor parallelism divides. Rows are better: fully_shard gathers them in
their place, and columns by a copy of each weight. So it divides dimension 0 where nothing else
does, but for experts, first by expert, and lightning attention's norm, first by tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

_ROWS_ARE_HIDDEN = ("out_proj", "o_proj", "down_proj")
_WHOLE = ("gate", "coefficient")


@dataclass(frozen=True)
class ParameterParts:
    """How one parameter is divided.

    weights: dimension that fully_shard divides where it cannot divide dimension 0.
    tensor: dimension that tensor parallelism divides; None leaves a copy on each rank.
    is_expert: whether dimension 0 is experts.
    has_halves: whether the tensor dimension is gate above up, each of which is divided.
    """

    weights: int
    tensor: int | None
    is_expert: bool
    has_halves: bool


def parts_of(name: str) -> ParameterParts:
    """Return how a parameter of HybridModel is divided, by its name."""
    path = name.removesuffix(".weight").split(".")
    kind, is_expert = path[-1], path[-2:-1] == ["experts"]
    offset = int(is_expert)
    if kind == "norm" and path[-2:-1] == ["self_attn"]:
        return ParameterParts(0, 0, False, False)
    if kind == "norm" or kind.endswith("layernorm"):
        return ParameterParts(0, None, False, False)
    if kind in _WHOLE:
        return ParameterParts(1, None, False, False)
    if kind in _ROWS_ARE_HIDDEN:
        return ParameterParts(offset, offset + 1, is_expert, False)
    return ParameterParts(offset + 1, offset, is_expert, kind == "gate_up_proj")


def weights_dimension(parts: ParameterParts, num_rows: int, shards: int, width: int) -> int:
    """Return the dimension that fully_shard divides.

    Args:
        parts: of the parameter.
        num_rows: of its dimension 0, as other divisions leave it.
        shards: ranks that fully_shard divides it among.
        width: ranks that tensor parallelism divides it among.
    """
    is_taken = parts.tensor == 0 and (width > 1 or parts.has_halves)
    return parts.weights if is_taken or num_rows % shards else 0


def held_parts(name: str, x: Tensor) -> ParameterParts:
    """Return how x, a parameter that fully_shard may have divided, or its moment, is divided."""
    parts = parts_of(name)
    if not isinstance(x, DTensor):
        return parts
    (placement,) = (p for p in x.placements if isinstance(p, Shard))
    return replace(parts, weights=placement.dim)


def tensor_slice(x: Tensor, parts: ParameterParts, index: int, size: int) -> Tensor:
    """Return a tensor rank's part of a whole parameter, as a view or, of halves, a copy."""
    if parts.tensor is None:
        return x
    halves = x.chunk(2, parts.tensor) if parts.has_halves else (x,)
    own = [half.chunk(size, parts.tensor)[index] for half in halves]
    return own[0] if len(own) == 1 else torch.cat(own, parts.tensor)


def joined_slices(slices: Sequence[Tensor], parts: ParameterParts) -> Tensor:
    """Join the parts of all tensor ranks: the inverse of tensor_slice."""
    if parts.tensor is None:
        return slices[0]
    if not parts.has_halves:
        return torch.cat(list(slices), parts.tensor)
    halves = [by_halves(x, parts) for x in slices]
    return torch.cat(halves, parts.tensor + 1).flatten(parts.tensor, parts.tensor + 1)


def by_halves(x: Tensor, parts: ParameterParts) -> Tensor:
    """View [..., 2 F, ...] as [..., 2, F, ...] where a parameter has halves.

    In this form a part of the width is a plain slice, whatever its degree: checkpoints hold it.
    """
    if not parts.has_halves or parts.tensor is None:
        return x
    return x.unflatten(parts.tensor, (2, -1))
