"""Data parallelism: fully_shard over a plain model, whose gradients are sums."""

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from sevenfold.models import HybridModel
from sevenfold.models.block import Block
from sevenfold.models.feed_forward import Experts, MixtureOfExperts
from sevenfold.models.layers import Linear
from sevenfold.parallel.layout import Layout
from sevenfold.parallel.parts import parts_of, weights_dimension
from sevenfold.parallel.pipeline import own_blocks
from sevenfold.parallel.weights_by_copies import exchange_by_copies

# Gradients are summed, and kept, in fp32.
_IN_BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def shard_model(model: HybridModel, layout: Layout) -> None:
    """Divide weights, gradients and moments among the ranks that hold different tokens.

        gradient of a weight = sum over ranks of their gradients

    A sum, not fully_shard's mean: each rank's loss is its share of the whole batch's, divided by
    the labels of the whole batch, so tokens weigh alike wherever they lie.

    Args:
        model: changed in place, each block a unit; names stay.
        layout: of more than one rank.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    alone = _experts_of_one_rank(model, layout)

    def along(parameter: nn.Parameter) -> Shard:
        parts, config = parts_of(names[id(parameter)]), layout.config
        shards, width = config.weight_shards, config.tensor
        if parts.is_expert:
            shards, width = config.expert_shards, config.expert_width
        return Shard(weights_dimension(parts, len(parameter), shards, width))

    def shard(
        module: nn.Module | list[nn.Module], *, again: bool, narrow: bool, experts: bool = False
    ) -> None:
        unit = fully_shard(
            module,
            mesh=layout.expert_mesh if experts else layout.weight_mesh,
            mp_policy=_IN_BF16 if narrow else MixedPrecisionPolicy(),
            shard_placement_fn=along,
            reshard_after_forward=again,
            ignored_params=alone,
        )
        if layout.config.weight_exchange == "copies":
            copies = layout.expert_copies if experts else layout.weight_copies
            for part in unit if isinstance(unit, list) else [unit]:
                exchange_by_copies(part, copies)

    again, narrow = not layout.config.gather_once, layout.config.gather_dtype is not None
    for block in own_blocks(model):
        if layout.config.routes_tokens and isinstance(block.mlp, MixtureOfExperts) and not alone:
            shard(block.mlp.experts, again=again, narrow=narrow, experts=True)
        unit = _products(block, alone) if narrow else block
        shard(unit, again=again, narrow=narrow)
    # The head is read after the forward, so the outermost unit stays whole until the backward.
    shard(model, again=False, narrow=False)
    method = "hidden" if layout.config.pipeline == 1 else "run_stage"
    register_fsdp_forward_method(model, method)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        # gloo has no scaled sum, and NCCL's mean would be the wrong thing.
        unit.set_force_sum_reduction_for_comms(True)


def _products(block: Block, alone: set[nn.Parameter]) -> list[nn.Module]:
    """The parts of a block whose weights meet nothing but products, which autocast takes in bf16.

    The others, norms and routers, are small, and the outermost unit's. A part that no rank shares
    is none: called once more, for another token group, it would have the unit gathered again.
    """
    apart = getattr(block.mlp, "coefficient", None)  # in fp32, as the router
    found = [
        part for part in block.modules() if isinstance(part, Linear | Experts) and part is not apart
    ]
    shared = [part for part in found if not alone.issuperset(part.parameters())]
    return [part for part in shared if not isinstance(part, FSDPModule)]


def _experts_of_one_rank(model: HybridModel, layout: Layout) -> set[nn.Parameter]:
    """Parts of experts that no other rank holds: their gradients are whole where they lie."""
    if not layout.config.routes_tokens or layout.expert_mesh.size() > 1:
        return set()
    mixtures = [b.mlp for b in own_blocks(model) if isinstance(b.mlp, MixtureOfExperts)]
    return {parameter for moe in mixtures for parameter in moe.experts.parameters()}


def release_weights(model: nn.Module) -> None:
    """Give back whole weights that a forward without a backward has left."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
