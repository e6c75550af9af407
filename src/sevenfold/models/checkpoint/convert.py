"""Converting between the formats, tensor by tensor from mapped files to files."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sevenfold.config import CheckpointError
from sevenfold.models.checkpoint.folder import staged_folder
from sevenfold.models.checkpoint.formats import detect_format, read_config, write_config
from sevenfold.models.checkpoint.parts import Part, list_parts
from sevenfold.models.checkpoint.reader import TensorFolder
from sevenfold.models.checkpoint.save import MAX_SHARD_BYTES, check_shard_size
from sevenfold.models.checkpoint.schema import CONFIG_FILE, CheckpointFormat
from sevenfold.models.checkpoint.side_files import copy_side_files
from sevenfold.models.checkpoint.writer import TensorToWrite, write_json, write_tensors


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    to: CheckpointFormat,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another format, bit for bit; the model may be larger than memory.

    Every tensor keeps its dtype. Tokenizer, chat template and generation defaults are copied.

    Args:
        src: a checkpoint of any of the three formats.
        dst: the folder to be, not src.
        to: "sevenfold", "hf" (transformers' minimax) or "minimax" (the original).
        max_shard_bytes: at least 1; weights in a file, but for a larger tensor.
        overwrite: replace a checkpoint that is at dst.

    Raises:
        CheckpointError: src breaks a rule, dst is taken, or the disk is full.
        UnsupportedError: the format cannot express the model; the message names the field.
        ValueError: max_shard_bytes, to or dst breaks its rule.
    """
    check_shard_size(max_shard_bytes)
    src, dst = Path(src).resolve(), Path(dst).resolve()
    if src == dst:
        raise ValueError(f"dst must be another folder than src, got {dst}")
    config, kind = read_config(src), detect_format(src)
    parts = list_parts(config, kind)
    files = TensorFolder(src)
    files.check(parts, kind)
    sources = _by_parameter(parts)
    document = write_config(config, to, _dtype(files, sources["embed_tokens.weight"]))
    tensors = [_tensor(part, sources[part.parameter], files) for part in list_parts(config, to)]
    need_bytes = sum(tensor.num_bytes for tensor in tensors)
    with staged_folder(dst, need_bytes, overwrite=overwrite) as folder:
        write_json(folder / CONFIG_FILE, document)
        copy_side_files(src, folder)
        write_tensors(folder, tensors, max_shard_bytes)


def _by_parameter(parts: list[Part]) -> dict[str, list[Part]]:
    groups = defaultdict(list)
    for part in parts:
        groups[part.parameter].append(part)
    return groups


def _tensor(part: Part, sources: list[Part], files: TensorFolder) -> TensorToWrite:
    touched = [s for s in sources if s.start < part.stop and part.start < s.stop]
    spans = partial(_spans, part, touched, files)
    return TensorToWrite(part.name, part.shape, _dtype(files, touched), spans)


def _spans(part: Part, sources: list[Part], files: TensorFolder) -> Iterator[Tensor]:
    """The elements of a new tensor, as they lie in the old ones."""
    for source in sources:
        first, last = max(part.start, source.start), min(part.stop, source.stop)
        flat = files.get(source.name).reshape(-1)
        yield flat[first - source.start : last - source.start]


def _dtype(files: TensorFolder, sources: list[Part]) -> torch.dtype:
    """The one dtype of tensors that become one."""
    first, *others = (files.stored[source.name] for source in sources)
    for source, other in zip(sources[1:], others, strict=True):
        if other.dtype != first.dtype:
            raise CheckpointError(
                f"{other.file}: tensor {source.name} must have the dtype of {sources[0].name}, "
                f"{first.dtype}, got {other.dtype}; the two become one tensor"
            )
    return first.dtype
