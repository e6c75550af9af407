"""Optimizers, parameter groups and learning-rate schedules."""

from sevenfold.optim.adamw import AdamWConfig, build_adamw
from sevenfold.optim.groups import ParameterGroup, parameter_groups
from sevenfold.optim.schedule import ScheduleConfig, lr_multiplier

__all__ = [
    "AdamWConfig",
    "ParameterGroup",
    "ScheduleConfig",
    "build_adamw",
    "lr_multiplier",
    "parameter_groups",
]
