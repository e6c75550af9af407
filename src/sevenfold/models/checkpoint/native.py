"""Our own config.json: ModelConfig as it is, under a format name and a version."""

from collections.abc import Mapping
from typing import Any

from sevenfold.config import CheckpointError, unknown_name
from sevenfold.models.checkpoint.schema import build_config
from sevenfold.models.config import ModelConfig

VERSION = 1
_KEYS = ("format", "version", "model")


def read(document: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the model of our own config.json.

    Raises:
        CheckpointError: a key is unknown or missing, the version is another, a value is wrong.
    """
    for key in document:
        if key not in _KEYS:
            raise CheckpointError(f"{source}: {unknown_name('key', key, _KEYS)}")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{source}: version must be {VERSION}, got {document.get('version')!r}; "
            f"a newer version needs a newer sevenfold"
        )
    model = document.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{source}: model must be a table, got {model!r}")
    return build_config(model, source)


def write(config: ModelConfig) -> dict[str, Any]:
    """Return our own config.json."""
    return {"format": "sevenfold", "version": VERSION, "model": config.model_dump(mode="json")}
