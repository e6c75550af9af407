"""Checkpoints: our own format, transformers' `minimax`, and the original MiniMax schema."""

from sevenfold.models.checkpoint.convert import convert
from sevenfold.models.checkpoint.formats import detect_format, read_config
from sevenfold.models.checkpoint.load import load_model
from sevenfold.models.checkpoint.save import save_model
from sevenfold.models.checkpoint.schema import CheckpointFormat

__all__ = [
    "CheckpointFormat",
    "convert",
    "detect_format",
    "load_model",
    "read_config",
    "save_model",
]
