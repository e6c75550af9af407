"""The three formats by name, and the reading of a foreign config.json key by key."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sevenfold.config import (
    CheckpointError,
    ConfigError,
    UnsupportedError,
    parse_config,
    unknown_name,
)
from sevenfold.models.config import ModelConfig

CheckpointFormat = Literal["sevenfold", "hf", "minimax"]

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

# Our own table in a published config.json: see extra.py.
EXTRA_KEY = "sevenfold"


@dataclass(frozen=True)
class KeyRules:
    """What each key of a published config.json is to us.

    renamed: their name -> ModelConfig's, the value unchanged.
    read: keys that the schema's own code reads.
    fixed: key -> the values that change nothing; any other asks for what we do not compute.
    ignored: keys without a meaning for the mathematics.
    """

    renamed: Mapping[str, str]
    read: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]]
    ignored: frozenset[str]

    def check(self, values: Mapping[str, Any], source: str) -> None:
        """Raise unless every key is known and every fixed one has a value that changes nothing.

        Raises:
            CheckpointError: a key is unknown; the message names the nearest.
            UnsupportedError: a fixed key has another value.
        """
        known = {*self.renamed, *self.read, *self.fixed, *self.ignored, EXTRA_KEY}
        for key, value in values.items():
            if key not in known:
                raise CheckpointError(f"{source}: {unknown_name('key', key, sorted(known))}")
            if key in self.fixed and value not in self.fixed[key]:
                allowed = " or ".join(json.dumps(v) for v in self.fixed[key])
                raise UnsupportedError(f"{source}: {key} must be {allowed}, got {value!r}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} must be readable, got: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON, got: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def build_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """Validate ModelConfig's values; a fault is a CheckpointError that names the file."""
    try:
        return parse_config(ModelConfig, values, source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def require_keys(values: Mapping[str, Any], keys: Sequence[str], source: str) -> None:
    """Raise CheckpointError unless every key is there."""
    missing = [key for key in keys if values.get(key) is None]
    if missing:
        raise CheckpointError(f"{source}: {', '.join(missing)} must be given, got no value")


def require_layers(values: Mapping[str, Any], layers: Sequence[Any], key: str, source: str) -> None:
    """Raise CheckpointError unless a list has one entry for each of num_hidden_layers."""
    if len(layers) != values["num_hidden_layers"]:
        raise CheckpointError(
            f"{source}: {key} must have num_hidden_layers = {values['num_hidden_layers']} "
            f"entries, got {len(layers)}"
        )


def one_for_all(values: Mapping[str, Any], key: str, source: str) -> Any:
    """Return the value of a key that may be a list over layers, whose entries must then agree."""
    value = values.get(key)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UnsupportedError(f"{source}: {key} must be the same in every layer, got {value}")
    return value[0]
