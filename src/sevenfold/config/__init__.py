"""Errors and strict configuration: the layer that everything else stands on."""

from sevenfold.config.checks import check_type
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
    as_tuple,
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
    "as_tuple",
    "check_type",
    "merge_tables",
    "nearest_name",
    "parse_config",
    "read_toml",
    "unknown_name",
]
