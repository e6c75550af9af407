"""Optimizers, parameter groups and learning-rate schedules."""

from sevenfold.optim.adamw import AdamWConfig, build_adamw
from sevenfold.optim.build import OptimizerConfig, build_optimizer, groups_of
from sevenfold.optim.groups import GroupConfig, ParameterGroup, parameter_groups
from sevenfold.optim.memory import HeldMatrix, muon_update_bytes
from sevenfold.optim.muon import Muon, Parts
from sevenfold.optim.orthogonal import orthogonalized
from sevenfold.optim.schedule import ScheduleConfig, lr_multiplier

__all__ = [
    "AdamWConfig",
    "GroupConfig",
    "HeldMatrix",
    "Muon",
    "OptimizerConfig",
    "ParameterGroup",
    "Parts",
    "ScheduleConfig",
    "build_adamw",
    "build_optimizer",
    "groups_of",
    "lr_multiplier",
    "muon_update_bytes",
    "orthogonalized",
    "parameter_groups",
]
