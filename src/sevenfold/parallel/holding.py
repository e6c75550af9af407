"""What a rank holds of each parameter and of its moments, by arithmetic alone."""

from typing import NamedTuple

import torch
from torch import nn

from sevenfold.models import HybridModel, ModelConfig
from sevenfold.optim import HeldMatrix, OptimizerConfig, groups_of, muon_update_bytes
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.parts import parts_of
from sevenfold.parallel.pipeline import rank_stages

_MOMENTS = {"adamw": 2, "muon": 1}


class Held(NamedTuple):
    """One parameter of a rank.

    shape: as Muon gathers it: the rank's experts, all else whole.
    whole: elements that the rank computes with, of its tensor part and its experts.
    own: those of them that fully_shard leaves it.
    """

    shape: tuple[int, ...]
    whole: int
    own: int


class OptimizerShare(NamedTuple):
    """Elements of a rank's moments, and what it holds besides in an update, bytes."""

    moments: int
    update_bytes: int


def held_by_rank(model: ModelConfig, parallel: ParallelConfig, rank: int) -> dict[str, Held]:
    """Return what one pipeline rank has of each parameter, by name."""
    return _held_of(_on_meta(model), model, parallel, rank)


def rank_layers(model: ModelConfig, parallel: ParallelConfig, rank: int) -> list[int]:
    """Return the layers of one pipeline rank."""
    stages = rank_stages(parallel, model.num_hidden_layers, rank)
    return [layer for stage in stages for layer in stage.layers]


def parameter_names(model: ModelConfig) -> list[str]:
    """Return the names of all parameters of a model, of which a pipeline's rank has some."""
    return list(_on_meta(model))


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter, None of embedding, last norm and head."""
    outer, *rest = name.split(".")
    return int(rest[0]) if outer == "layers" else None


def optimizer_share(
    model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, rank: int
) -> OptimizerShare:
    """Count what an optimizer holds on one pipeline rank, by the groups that the run would make."""
    named = _on_meta(model)
    held = _held_of(named, model, parallel, rank)
    names = {id(parameter): name for name, parameter in named.items()}
    moments, matrices = 0, []
    for group in groups_of(named.items(), optimizer):
        own = [names[id(p)] for p in group["params"] if names[id(p)] in held]
        moments += _MOMENTS[group["kind"]] * sum(held[name].own for name in own)
        if group["kind"] == "muon":
            matrices.append([_matrix(name, held[name]) for name in own])
    return OptimizerShare(moments, muon_update_bytes(matrices))


def _held_of(
    named: dict[str, nn.Parameter], model: ModelConfig, parallel: ParallelConfig, rank: int
) -> dict[str, Held]:
    layers = set(rank_layers(model, parallel, rank))
    found = {}
    for name, parameter in named.items():
        layer = layer_of(name)
        if layer is None:
            is_first = name.startswith("embed_tokens.")
            has = rank == (0 if is_first else parallel.pipeline - 1)
        else:
            has = layer in layers
        if has:
            found[name] = _held(name, parameter, parallel)
    return found


def _matrix(name: str, held: Held) -> HeldMatrix:
    """Its part of a result is a view unless fully_shard or halves cut it."""
    whole = torch.Size(held.shape).numel()
    is_cut = held.own < held.whole or (held.whole < whole and parts_of(name).has_halves)
    return HeldMatrix(held.shape, held.own, is_cut)


def _on_meta(model: ModelConfig) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        return dict(HybridModel(model).named_parameters())


def _held(name: str, parameter: nn.Parameter, parallel: ParallelConfig) -> Held:
    parts, shape = parts_of(name), list(parameter.shape)
    width, shards = parallel.tensor, parallel.weight_shards
    if parts.is_expert:
        width, shards = parallel.expert_width, parallel.expert_shards
        shape[0] //= parallel.expert
    size = torch.Size(shape).numel() // (1 if parts.tensor is None else width)
    return Held(tuple(shape), size, size // shards)
