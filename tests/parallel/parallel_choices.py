"""Choices that leave some ranks without a row for others, or from them.

A rank that stayed away from an exchange of nothing, or from its gradient's, would leave the others
waiting for ever.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from parallel_helpers import MODEL
from torch import Tensor

from sevenfold.config import parse_config
from sevenfold.models import ModelConfig
from sevenfold.models.feed_forward import MixtureOfExperts
from sevenfold.parallel import Layout, ParallelConfig
from sevenfold.parallel.experts import divide_experts

TOKENS = 7
# Whose experts the tokens of a rank choose, of so many ranks.
CHOICES = {
    "own": lambda rank, ranks: rank,
    "next": lambda rank, ranks: (rank + 1) % ranks,
    "first": lambda rank, ranks: 0,
}


@dataclass(frozen=True)
class Choices:
    """Each rank's tokens choose two experts of one rank."""

    chosen: str
    num_ranks: int
    token_groups: int
    capacity_factor: float | None

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.chosen, self.num_ranks, self.token_groups, self.drops)))

    @property
    def drops(self) -> bool:
        return self.capacity_factor is not None

    @property
    def config(self) -> ParallelConfig:
        size = self.num_ranks
        return ParallelConfig(shard=size, expert=size, expert_token_groups=self.token_groups)

    def mixture(self) -> MixtureOfExperts:
        """The whole layer, in training, with two experts for each rank."""
        moe = {"num_local_experts": 2 * self.num_ranks, "capacity_factor": self.capacity_factor}
        model = parse_config(ModelConfig, MODEL | {"moe": moe}, "test")
        assert model.moe is not None
        layer = MixtureOfExperts(model, model.moe).double().train()
        generator = torch.Generator().manual_seed(1)
        for weight in layer.experts.parameters():
            torch.nn.init.normal_(weight, generator=generator)
        return layer

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [T, D], weights [T, k], experts [T, k] and y's gradient, of all ranks' tokens."""
        generator, T = torch.Generator().manual_seed(2), self.num_ranks * TOKENS
        tokens, dy = torch.randn(2, T, 16, dtype=torch.float64, generator=generator)
        weights = torch.rand(T, 2, dtype=torch.float64, generator=generator)
        whose = [CHOICES[self.chosen](rank, self.num_ranks) for rank in range(self.num_ranks)]
        first = 2 * torch.tensor(whose).repeat_interleave(TOKENS)
        return tokens, weights, torch.stack([first + 1, first], 1), dy


class Result(NamedTuple):
    """What the layer gave for tokens, and the gradients of tokens, weights and matrices."""

    y: Tensor
    dtokens: Tensor
    dweights: Tensor
    dgate_up: Tensor
    ddown: Tensor


def result_of(
    layer: MixtureOfExperts, tokens: Tensor, weights: Tensor, experts: Tensor, dy: Tensor
) -> Result:
    leaves = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
    y, _ = layer.routed(*leaves, experts)
    held = (layer.experts.gate_up_proj, layer.experts.down_proj)
    return Result(y.detach(), *torch.autograd.grad(y, (*leaves, *held), dy))


def result_of_rank(choices: Choices, layout: Layout, rank: int) -> Result:
    """What a rank gives for its own tokens, with its own experts."""
    layer = choices.mixture()
    divide_experts(layer, layout)
    own = slice(rank * TOKENS, (rank + 1) * TOKENS)
    return result_of(layer, *(x[own] for x in choices.inputs()))


CASES = [
    Choices(chosen, num_ranks, token_groups, capacity_factor)
    for chosen in CHOICES
    for num_ranks in (2, 4)
    for token_groups in (1, 3)
    for capacity_factor in (None, 0.6)
]
