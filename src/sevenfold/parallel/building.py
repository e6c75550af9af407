"""Building what a rank holds of a model: divided without memory first, filled part by part then.

No process ever has the whole model: the largest thing that exists is one matrix on the host.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sevenfold.models import HybridModel, ModelConfig, initial_weight
from sevenfold.parallel.apply import divide_model, shard_weights
from sevenfold.parallel.gradients import local
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import ParameterParts, held_parts, tensor_slice


def build_model(
    config: ModelConfig,
    layout: Layout,
    *,
    seed: int,
    device: torch.device,
    between: Callable[[HybridModel], None],
    dtype: torch.dtype = torch.float32,
) -> HybridModel:
    """Build this rank's part of a model with its initial weights, which no layout changes.

    Args:
        config: of the whole model; its sizes suit the layout.
        layout: of the run.
        seed: of the initial weights.
        device: where they are to lie.
        between: applied after division and before fully_shard: recomputation.
        dtype: of the weights.

    Returns:
        The model, in training mode.
    """
    model = divided_on_meta(config, layout, between=between, dtype=dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty makes one of each
    whole = _on_meta(config)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, shapes[name], config, layout, seed)
    return model


def divided_on_meta(
    config: ModelConfig,
    layout: Layout,
    *,
    between: Callable[[HybridModel], None],
    dtype: torch.dtype = torch.float32,
) -> HybridModel:
    """Build this rank's part of a model without memory; see build_model."""
    model = _on_meta(config).to(dtype)
    divide_model(model, layout)
    between(model)
    shard_weights(model, layout)
    return model


def _on_meta(config: ModelConfig) -> HybridModel:
    with torch.device("meta"):
        return HybridModel(config)


def _fill(
    name: str, parameter: Tensor, shape: torch.Size, config: ModelConfig, layout: Layout, seed: int
) -> None:
    parts, held = held_parts(name, parameter), local(parameter)
    if not parts.is_expert:
        whole = initial_weight(name, shape, config, seed=seed)
        held.copy_(_own_part(whole, parts, layout, 0))
        return
    first = _first_expert(parts, len(held), layout)
    for index, matrix in enumerate(held):
        whole = initial_weight(name, shape[1:], config, seed=seed, expert=first + index)
        matrix.copy_(_own_part(whole, parts, layout, 1))


def _first_expert(parts: ParameterParts, num_held: int, layout: Layout) -> int:
    place, c = layout.place, layout.config
    if parts.weights != 0:
        return place.expert * num_held
    return (place.expert * c.expert_shards + _shard(parts, layout)) * num_held


def _shard(parts: ParameterParts, layout: Layout) -> int:
    """Which part of those that fully_shard makes this rank holds."""
    c, place = layout.config, layout.place
    weights = place.data % c.shard * c.context + place.context
    if not parts.is_expert:
        return weights
    return (weights * c.tensor + place.tensor) // (c.expert * c.expert_width)


def _own_part(whole: Tensor, parts: ParameterParts, layout: Layout, skipped: int) -> Tensor:
    """This rank's part of a matrix; `skipped` dimensions of the parameter are not the matrix's."""
    c, place = layout.config, layout.place
    shards, width, part = c.weight_shards, c.tensor, place.tensor
    if parts.is_expert:
        shards, width, part = c.expert_shards, c.expert_width, place.expert_tensor
    tensor = None if parts.tensor is None else parts.tensor - skipped
    of_matrix = ParameterParts(parts.weights - skipped, tensor, False, parts.has_halves)
    own = tensor_slice(whole, of_matrix, part, width)
    if of_matrix.weights < 0:  # of experts, whole ones
        return own
    return own.chunk(shards, of_matrix.weights)[_shard(parts, layout)]
