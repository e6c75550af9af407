"""Which parameters decay."""

from collections.abc import Iterable
from typing import TypedDict

from torch import nn

_EMBEDDING = "embed_tokens.weight"


class ParameterGroup(TypedDict):
    """Parameters that share a weight decay, as torch.optim takes them."""

    params: list[nn.Parameter]
    weight_decay: float


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    decay_embeddings: bool = True,
) -> list[ParameterGroup]:
    """Split parameters into those that decay and those that do not.

    One-dimensional parameters (the weights of norms) never decay: their scale is their meaning.

    Args:
        named_parameters: as nn.Module.named_parameters yields them.
        weight_decay: of the group that decays, >= 0.
        decay_embeddings: whether embed_tokens decays; a tied head is that same parameter.

    Returns:
        The groups that have a parameter, the decaying one first.
    """
    decaying: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        spared = parameter.dim() <= 1 or (name.endswith(_EMBEDDING) and not decay_embeddings)
        (kept if spared else decaying).append(parameter)
    groups = [
        ParameterGroup(params=decaying, weight_decay=weight_decay),
        ParameterGroup(params=kept, weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]
