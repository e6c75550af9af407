"""The hybrid model: configuration, layers, state, initial weights."""

from sevenfold.models.batch import Batch
from sevenfold.models.config import LayerType, ModelConfig, MoEConfig
from sevenfold.models.drafts import DraftedState, DraftLayout, EncodedDrafts
from sevenfold.models.hybrid import HiddenResult, HybridModel
from sevenfold.models.init import deepnorm_alpha, deepnorm_beta, init_weights, initial_weight
from sevenfold.models.presets import preset, preset_names, resolve_model
from sevenfold.models.state import (
    EncodedState,
    KVState,
    LayerState,
    LinearState,
    OwnState,
    PagedKV,
    PagedTree,
    PageTable,
    PooledState,
    empty_state,
    select_sequences,
)

__all__ = [
    "Batch",
    "DraftLayout",
    "DraftedState",
    "EncodedDrafts",
    "EncodedState",
    "HiddenResult",
    "HybridModel",
    "KVState",
    "LayerState",
    "LayerType",
    "LinearState",
    "MoEConfig",
    "ModelConfig",
    "OwnState",
    "PageTable",
    "PagedKV",
    "PagedTree",
    "PooledState",
    "deepnorm_alpha",
    "deepnorm_beta",
    "empty_state",
    "init_weights",
    "initial_weight",
    "preset",
    "preset_names",
    "resolve_model",
    "select_sequences",
]
