"""The optimizer that a run file asks for."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from sevenfold.optim.adamw import AdamWConfig, adamw_of
from sevenfold.optim.groups import GroupConfig, ParameterGroup, parameter_groups
from sevenfold.optim.muon import UNDIVIDED, Muon, Parts


class OptimizerConfig(AdamWConfig):
    """AdamW for all parameters, or Muon for matrices and AdamW for the rest.

    Args:
        kind: "adamw" or "muon".
        momentum: Muon's; None is 0.95.
        groups: exceptions by name.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    groups: tuple[GroupConfig, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "adamw":
            if self.momentum is not None:
                raise ValueError(
                    f"momentum must be left out with kind = 'adamw', whose betas say it, got "
                    f"{self.momentum}"
                )
            if any(group.kind is not None for group in self.groups):
                raise ValueError("groups must have no kind with kind = 'adamw', which all have")
        return self


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    *,
    by_mesh: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda groups: groups,
    parts: Parts = UNDIVIDED,
    names: Iterable[str] | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer with its moments allocated, so that a checkpoint has the same tensors.

    Args:
        named_parameters: on their final device.
        config: settings.
        by_mesh: parts groups by how ranks divide their parameters.
        parts: how ranks hold a matrix.
        names: of the whole model's parameters, where these are one stage's; None: these are all.

    Returns:
        The optimizer; the caller sets each group's lr every step, times its lr_factor.

    Raises:
        ConfigError: a group names no parameter.
    """
    groups = groups_of(named_parameters, config, names)
    rest = by_mesh([dict(group) for group in groups if group["kind"] == "adamw"])
    if config.kind == "adamw":
        return adamw_of(rest, config)
    matrices = [dict(group) for group in groups if group["kind"] == "muon"]
    momentum = 0.95 if config.momentum is None else config.momentum
    return Muon(matrices, adamw_of(rest, config), momentum=momentum, parts=parts)


def groups_of(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    names: Iterable[str] | None = None,
) -> list[ParameterGroup]:
    """Sort parameters as an optimizer's settings say; see parameter_groups."""
    return parameter_groups(
        named_parameters,
        weight_decay=config.weight_decay,
        decay_embeddings=config.decay_embeddings,
        kind=config.kind,
        groups=config.groups,
        names=names,
    )
