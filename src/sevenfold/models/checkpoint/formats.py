"""Which format a folder has, and the model that its config.json describes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sevenfold.config import CheckpointError
from sevenfold.models.checkpoint import huggingface, minimax, native
from sevenfold.models.checkpoint.published import single_id
from sevenfold.models.checkpoint.schema import (
    CONFIG_FILE,
    GENERATION_FILE,
    CheckpointFormat,
    read_json,
)
from sevenfold.models.config import ModelConfig

_READERS: dict[CheckpointFormat, Callable[[Mapping[str, Any], str], ModelConfig]] = {
    "sevenfold": native.read,
    "hf": huggingface.read,
    "minimax": minimax.read,
}
_WRITERS: dict[CheckpointFormat, Callable[[ModelConfig], dict[str, Any]]] = {
    "sevenfold": native.write,
    "hf": huggingface.write,
    "minimax": minimax.write,
}
# transformers renamed the key in its version 5; the original's code knows the old name.
_DTYPE_KEYS: dict[CheckpointFormat, str] = {"hf": "dtype", "minimax": "torch_dtype"}


def detect_format(path: Path | str) -> CheckpointFormat:
    """Return which of the three formats a checkpoint has.

    Args:
        path: the checkpoint's folder, or its config.json.

    Returns:
        "sevenfold", "hf" (transformers' model type minimax) or "minimax" (the original).

    Raises:
        CheckpointError: there is no config.json, or it is of another model.
    """
    file = _config_file(Path(path))
    return _format_of(read_json(file), file)


def read_config(path: Path | str) -> ModelConfig:
    """Read the model that a checkpoint describes, in any of the three formats.

    Args:
        path: the checkpoint's folder, or its config.json.

    Returns:
        The model; eos_token_id comes from generation_config.json where config.json has none.

    Raises:
        CheckpointError: a key is unknown, missing or wrong; the message names file, key and remedy.
        UnsupportedError: a key asks for what we do not compute.
    """
    file = _config_file(Path(path))
    document = read_json(file)
    config = _READERS[_format_of(document, file)](document, str(file))
    generation = file.with_name(GENERATION_FILE)
    if config.eos_token_id is not None or not generation.is_file():
        return config
    eos_token_id = single_id(read_json(generation).get("eos_token_id"), str(generation))
    return config.model_copy(update={"eos_token_id": eos_token_id})


def write_config(config: ModelConfig, to: CheckpointFormat, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a model in some format.

    Args:
        config: the model.
        to: the format.
        dtype: of the weights, which other programs want to find there.

    Raises:
        UnsupportedError: the format cannot express the model; the message names the field.
        ValueError: there is no such format.
    """
    if to not in _WRITERS:
        raise ValueError(f"format must be one of {', '.join(_WRITERS)}, got {to!r}")
    document = _WRITERS[to](config)
    if to in _DTYPE_KEYS:
        document[_DTYPE_KEYS[to]] = str(dtype).removeprefix("torch.")
    return document


def _config_file(path: Path) -> Path:
    return path if path.is_file() else path / CONFIG_FILE


def _format_of(document: Mapping[str, Any], file: Path) -> CheckpointFormat:
    if document.get("format") == "sevenfold":
        return "sevenfold"
    model_type = document.get("model_type")
    architectures = document.get("architectures") or []
    if model_type in minimax.MODEL_TYPES or set(architectures) & set(minimax.ARCHITECTURES):
        return "minimax"
    if model_type == huggingface.MODEL_TYPE:
        return "hf"
    known = ", ".join((huggingface.MODEL_TYPE, *minimax.MODEL_TYPES))
    raise CheckpointError(
        f"{file}: model_type must be one of {known}, or format 'sevenfold', got {model_type!r}"
    )
