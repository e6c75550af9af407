"""Saving a model in any of the three formats."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.models.checkpoint.folder import staged_folder
from sevenfold.models.checkpoint.formats import write_config
from sevenfold.models.checkpoint.parts import Part, list_parts, stored_dtype
from sevenfold.models.checkpoint.schema import CONFIG_FILE, CheckpointFormat
from sevenfold.models.checkpoint.side_files import copy_tokenizer
from sevenfold.models.checkpoint.writer import TensorToWrite, write_json, write_tensors
from sevenfold.models.hybrid import HybridModel

MAX_SHARD_BYTES = 5_000_000_000


def save_model(
    model: HybridModel,
    path: Path | str,
    *,
    format: CheckpointFormat = "sevenfold",
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Save a model as a folder that appears by one rename when it is complete.

    Args:
        model: on any device; tensors are brought to the host a piece at a time.
        path: the folder to be; its parents are made.
        format: "sevenfold", "hf" (transformers' minimax) or "minimax" (the original).
        tokenizer: a tokenizer.json, or a folder with one, to be copied.
        max_shard_bytes: at least 1; weights in a file, but for a larger tensor.
        overwrite: replace a checkpoint that is there.

    Raises:
        UnsupportedError: the format cannot express the model; the message names the field.
        CheckpointError: the path is taken, or the disk is full.
        ValueError: max_shard_bytes or format breaks its rule.
    """
    check_shard_size(max_shard_bytes)
    document = write_config(model.config, format, model.dtype)
    tensors = _tensors(model, format)
    need_bytes = sum(tensor.num_bytes for tensor in tensors)
    with staged_folder(Path(path).resolve(), need_bytes, overwrite=overwrite) as folder:
        write_json(folder / CONFIG_FILE, document)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        write_tensors(folder, tensors, max_shard_bytes)


def check_shard_size(max_shard_bytes: int) -> None:
    """Raise ValueError unless a shard may hold something."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")


def _tensors(model: HybridModel, to: CheckpointFormat) -> list[TensorToWrite]:
    parameters = dict(model.named_parameters())
    tensors = []
    for part in list_parts(model.config, to):
        parameter = parameters[part.parameter]
        dtype = stored_dtype(part.parameter, parameter.dtype)
        if to != "sevenfold" and dtype == torch.float64:
            raise UnsupportedError(
                f"{part.parameter} must be at most fp32 in format {to!r}, got {dtype}; "
                f"save model.float(), or take format 'sevenfold'"
            )
        spans = partial(_span, parameter, part)
        tensors.append(TensorToWrite(part.name, part.shape, dtype, spans))
    return tensors


def _span(parameter: Tensor, part: Part) -> Iterable[Tensor]:
    yield parameter.detach().reshape(-1)[part.start : part.stop]
