"""The small files beside the weights: tokenizer, generation defaults, chat template."""

import os
import shutil
from pathlib import Path

from sevenfold.config import CheckpointError
from sevenfold.models.checkpoint.schema import GENERATION_FILE

TOKENIZER_FILE = "tokenizer.json"
_NAMES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy those of the small files that a checkpoint has."""
    for name in _NAMES:
        if (source / name).is_file():
            _copy(source / name, folder / name)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer.json, or a folder's tokenizer with its other small files.

    Raises:
        CheckpointError: there is no tokenizer.json.
    """
    file = source / TOKENIZER_FILE if source.is_dir() else source
    if not file.is_file():
        raise CheckpointError(f"tokenizer must be a {TOKENIZER_FILE} or its folder, got {source}")
    if source.is_dir():
        copy_side_files(source, folder)
    else:
        _copy(source, folder / TOKENIZER_FILE)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
