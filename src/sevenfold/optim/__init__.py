"""Optimizers, parameter groups and learning-rate schedules."""

from sevenfold.optim.adamw import AdamWConfig, build_adamw
from sevenfold.optim.build import OptimizerConfig, build_optimizer
from sevenfold.optim.groups import GroupConfig, ParameterGroup, parameter_groups
from sevenfold.optim.muon import Muon, Parts
from sevenfold.optim.orthogonal import orthogonalized
from sevenfold.optim.schedule import ScheduleConfig, lr_multiplier

__all__ = [
    "AdamWConfig",
    "GroupConfig",
    "Muon",
    "OptimizerConfig",
    "ParameterGroup",
    "Parts",
    "ScheduleConfig",
    "build_adamw",
    "build_optimizer",
    "lr_multiplier",
    "orthogonalized",
    "parameter_groups",
]
