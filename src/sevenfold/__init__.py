"""Sevenfold: train, evaluate and serve hybrid linear-attention language models."""

from importlib.metadata import version

from sevenfold import ops
from sevenfold.config import (
    CheckpointError,
    ConfigError,
    DataError,
    SevenfoldError,
    TrainingError,
    UnsupportedError,
)
from sevenfold.engine import (
    LLM,
    Completion,
    Grammar,
    RequestFailedError,
    RequestOptions,
    SamplingParams,
    TextModel,
)
from sevenfold.models import HybridModel, ModelConfig, MoEConfig, preset
from sevenfold.models.checkpoint import load_model, save_model

__version__ = version("sevenfold")

__all__ = [
    "LLM",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DataError",
    "Grammar",
    "HybridModel",
    "MoEConfig",
    "ModelConfig",
    "RequestFailedError",
    "RequestOptions",
    "SamplingParams",
    "SevenfoldError",
    "TextModel",
    "TrainingError",
    "UnsupportedError",
    "__version__",
    "load_model",
    "ops",
    "preset",
    "save_model",
]
