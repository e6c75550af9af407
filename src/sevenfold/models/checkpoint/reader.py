"""The tensors of a checkpoint folder: headers read once, data mapped and never read whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sevenfold.config import CheckpointError, UnsupportedError, unknown_name
from sevenfold.models.checkpoint.parts import Part, is_derived
from sevenfold.models.checkpoint.schema import CheckpointFormat, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_REMEDY = "the download or copy may be incomplete: fetch the folder again"


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFolder:
    """Every tensor of a folder, by name; at most one file is mapped at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[str, StoredTensor] = {}
        for file, promised in _files(folder).items():
            self._add(file, promised)
        self._mapped: tuple[Path, Any] | None = None

    def get(self, name: str) -> Tensor:
        """Return a tensor that lies in the mapped file: its pages are read when they are used."""
        file = self.stored[name].file
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None
            self._mapped = (file, _open(file))
        return self._mapped[1].get_tensor(name)

    def check(self, parts: Sequence[Part], kind: CheckpointFormat) -> None:
        """Raise unless the headers hold exactly the tensors of a model.

        Args:
            parts: the tensors that the model needs.
            kind: the folder's format; published ones may hold decay buffers, which are ignored.

        Raises:
            CheckpointError: a tensor is unknown, missing, or of another shape; the message names
                file, tensor and remedy.
        """
        needed = {part.name: part for part in parts}
        for name, stored in self.stored.items():
            if name not in needed and not (kind != "sevenfold" and is_derived(name)):
                message = unknown_name("tensor", name, _few_known(name, needed))
                raise CheckpointError(f"{stored.file}: {message}")
        missing = [name for name in needed if name not in self.stored]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]}{more} must be present, got none; {_REMEDY}"
            )
        for name, part in needed.items():
            self._check_shape(name, part)

    def _check_shape(self, name: str, part: Part) -> None:
        stored = self.stored[name]
        if stored.shape != part.shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} must have shape {list(part.shape)}, "
                f"got {list(stored.shape)}; config.json and the weights must be of one model"
            )

    def _add(self, file: Path, promised: Sequence[str]) -> None:
        mapped = _open(file)
        found = set(mapped.keys())
        for name in promised:
            if name not in found:
                raise CheckpointError(
                    f"{file}: tensor {name} must be present as {INDEX_FILE} says, got none; "
                    f"{_REMEDY}"
                )
        for name in sorted(found):
            if name in self.stored:
                raise CheckpointError(
                    f"{file}: tensor {name} must lie in one file, got a second in "
                    f"{self.stored[name].file.name}; delete the stale file"
                )
            header = mapped.get_slice(name)
            dtype = _dtype(header.get_dtype(), name, file)
            self.stored[name] = StoredTensor(file, tuple(header.get_shape()), dtype)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} must be a whole safetensors file, got: {error}; {_REMEDY}"
        ) from error


def _dtype(code: str, name: str, file: Path) -> torch.dtype:
    if code not in DTYPES:
        raise UnsupportedError(
            f"{file}: tensor {name} must have one of the dtypes {', '.join(DTYPES)}, got {code}; "
            f"dequantise the checkpoint first"
        )
    return DTYPES[code]


def _files(folder: Path) -> dict[Path, list[str]]:
    """The folder's files, each with the tensors that the index promises in it."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE}, got both; delete the stale one"
        )
    if single.is_file():
        return {single: []}
    if not index.is_file():
        raise CheckpointError(
            f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE}, got neither; {_REMEDY}"
        )
    return _indexed_files(index)


def _indexed_files(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be a table of names, got {weight_map!r}")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        # A name with a path in it could point anywhere on this machine.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name} must lie in a plain file name, got {file!r}")
        files.setdefault(index.with_name(file), []).append(name)
    return files


def _few_known(name: str, needed: dict[str, Part]) -> list[str]:
    """The known names worth comparing a misspelt one with: those of its own layer."""
    depth = 3 if name.startswith("model.layers.") else 2 if name.startswith("layers.") else 0
    prefix = ".".join(name.split(".")[:depth])
    return [known for known in needed if known.startswith(prefix)] or list(needed)[:20]
