"""Safetensors files written piece by piece, so that no more than one piece is in memory."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sevenfold.models.checkpoint.reader import DTYPES, INDEX_FILE, SINGLE_FILE

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file to be: its header's entry, and its elements on demand, in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Sequence[TensorToWrite], max_shard_bytes: int) -> None:
    """Write one file, or shards with an index when one file would be too large.

    Args:
        folder: an existing folder.
        tensors: in the order in which they shall lie.
        max_shard_bytes: of data in a file; a larger tensor gets a file of its own.

    Raises:
        OSError: the folder cannot be written.
    """
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        _write_file(folder / name, shard)
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON object and wait until the disk has it."""
    with file.open("w", encoding="utf-8") as out:
        json.dump(values, out, indent=2)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())


def _shards(tensors: Sequence[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _write_file(file: Path, tensors: Sequence[TensorToWrite]) -> None:
    # Wide elements first: every tensor then begins at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with file.open("wb") as out:
        out.write(_header(ordered))
        for tensor in ordered:
            for span in tensor.spans():
                for piece in span.reshape(-1).split(_PIECE_ELEMENTS):
                    out.write(_bytes(piece.to(tensor.dtype)))
        out.flush()
        os.fsync(out.fileno())


def _header(tensors: Sequence[TensorToWrite]) -> bytes:
    """The format's head: its length in 8 bytes, then JSON filled up with spaces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.num_bytes
        code = _CODES[tensor.dtype]
        entries[tensor.name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(piece: Tensor) -> memoryview:
    return piece.detach().cpu().contiguous().view(torch.uint8).numpy().data
