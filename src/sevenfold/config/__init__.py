"""Errors and strict configuration: the layer that everything else stands on."""

from sevenfold.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    SevenfoldError,
    TrainingError,
    UnsupportedError,
)
from sevenfold.config.strict import (
    StrictModel,
    merge_tables,
    nearest_name,
    parse_config,
    read_toml,
    unknown_name,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "SevenfoldError",
    "StrictModel",
    "TrainingError",
    "UnsupportedError",
    "merge_tables",
    "nearest_name",
    "parse_config",
    "read_toml",
    "unknown_name",
]
