"""Which parameters decay, at which rate they learn, and by which rule."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self, TypedDict

from pydantic import Field, model_validator
from torch import nn

from sevenfold.config import ConfigError, StrictModel

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"

Rule = Literal["adamw", "muon"]


class GroupConfig(StrictModel):
    """What some parameters do otherwise; of several that name a parameter the first counts.

    Args:
        names: patterns of names, such as "layers.*.mlp.gate.weight" or "*.output_gate.*".
        lr_factor: multiplies the learning rate, > 0.
        weight_decay: in place of the optimizer's; None keeps that.
        kind: "adamw" takes matrices from Muon; None keeps the optimizer's.
    """

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    lr_factor: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    kind: Literal["adamw"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.lr_factor, self.weight_decay, self.kind) == (1.0, None, None):
            raise ValueError(f"groups must change something, got only names {list(self.names)}")
        return self

    def takes(self, name: str) -> bool:
        """Whether it is about a parameter."""
        return any(fnmatchcase(name, pattern) for pattern in self.names)


class ParameterGroup(TypedDict):
    """Parameters that share their settings, as torch.optim takes them."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_factor: float
    kind: Rule


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    decay_embeddings: bool = True,
    kind: Rule = "adamw",
    groups: Sequence[GroupConfig] = (),
    names: Iterable[str] | None = None,
) -> list[ParameterGroup]:
    """Sort parameters by what they share.

    One-dimensional parameters (the weights of norms) never decay: their scale is their meaning.

    Args:
        named_parameters: as nn.Module.named_parameters yields them.
        weight_decay: of the group that decays, >= 0.
        decay_embeddings: whether embed_tokens decays; a tied head is that same parameter.
        kind: "muon" for matrices, stacked ones included, but for embedding and head.
        groups: exceptions by name.
        names: of the whole model, where these are one stage's; None: these are all.

    Returns:
        The groups that have a parameter; those that decay come first.

    Raises:
        ConfigError: an exception names no parameter.
    """
    found: dict[tuple[Rule, float, float], list[nn.Parameter]] = {}
    named = list(named_parameters)
    _check_all_name(groups, [name for name, _ in named] if names is None else names)
    for name, parameter in named:
        given = next((group for group in groups if group.takes(name)), None)
        spared = parameter.dim() <= 1 or (name.endswith(_EMBEDDING) and not decay_embeddings)
        decay = 0.0 if spared else weight_decay
        rule: Rule = kind if _is_matrix(name, parameter) else "adamw"
        factor = 1.0
        if given is not None:
            decay = decay if given.weight_decay is None else given.weight_decay
            rule, factor = given.kind or rule, given.lr_factor
        found.setdefault((rule, decay, factor), []).append(parameter)
    by_decay = sorted(found.items(), key=lambda item: -item[0][1])
    return [
        ParameterGroup(params=params, weight_decay=decay, lr_factor=factor, kind=rule)
        for (rule, decay, factor), params in by_decay
    ]


def _check_all_name(groups: Sequence[GroupConfig], names: Iterable[str]) -> None:
    firsts = {next((i for i, group in enumerate(groups) if group.takes(x)), None) for x in names}
    for i, group in enumerate(groups):
        if i not in firsts:
            raise ConfigError(
                f"optimizer.groups must name parameters that no group before it names, got none "
                f"for {list(group.names)}"
            )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and not name.endswith((_EMBEDDING, _HEAD))
