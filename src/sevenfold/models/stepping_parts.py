"""Half layers that ranks hold in part: each rank's kernels, one sum over ranks, one kernel more."""

from torch import Tensor

from sevenfold.models.block import OverRanks
from sevenfold.ops import (
    DeviceExperts,
    Fed,
    LightningWeights,
    Norm,
    Residual,
    join_lightning,
    join_part_of_lightning,
    join_sum,
    part_of_dense,
    part_of_experts,
    part_of_lightning,
    part_of_softmax,
)


def lightning_over_ranks(
    weights: LightningWeights,
    residual: Residual,
    ranks: OverRanks,
    has_whole_group: bool,
    o: Tensor,
    fed: Fed,
) -> Tensor:
    """What comes after lightning attention o [M, H D] of this rank's heads: [M, D].

    has_whole_group: whether its norm is over this rank's heads alone.
    """
    if has_whole_group:
        part = join_lightning(o, fed, weights, Residual(0.0, 1.0, residual.post_norm))
        return join_sum(ranks.add(part), fed.stream, residual)
    sums = ranks.add(part_of_lightning(o, fed, weights))
    return join_part_of_lightning(sums, fed, weights, residual, ranks.num_ranks)


def softmax_over_ranks(
    out: Tensor, residual: Residual, ranks: OverRanks, o: Tensor, stream: Tensor
) -> Tensor:
    """What comes after softmax attention o [M, K] of this rank's heads: [M, D]."""
    return join_sum(ranks.add(part_of_softmax(o, out)), stream, residual)


def experts_over_ranks(
    norm: Norm, experts: DeviceExperts, residual: Residual, ranks: OverRanks, x: Tensor
) -> Tensor:
    """A block's second half over x [M, D], of experts of which each rank has some of the width."""
    part, stream = part_of_experts(x, norm, experts, post_norm=residual.post_norm)
    return join_sum(ranks.add(part), stream, residual)


def dense_over_ranks(
    norm: Norm, weights: tuple[Tensor, Tensor], residual: Residual, ranks: OverRanks, x: Tensor
) -> Tensor:
    """As experts_over_ranks, of a dense layer's gate_up and down."""
    part, stream = part_of_dense(x, norm, *weights, post_norm=residual.post_norm)
    return join_sum(ranks.add(part), stream, residual)
