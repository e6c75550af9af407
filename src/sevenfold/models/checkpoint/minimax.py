"""The schema of the original MiniMax-Text-01 and MiniMax-M1 checkpoints."""

from collections.abc import Mapping
from typing import Any

from sevenfold.config import CheckpointError
from sevenfold.models.checkpoint import published
from sevenfold.models.checkpoint.schema import (
    KeyRules,
    one_for_all,
    require_keys,
    require_layers,
)
from sevenfold.models.config import LayerType, ModelConfig

MODEL_TYPES = ("minimax_text_01", "minimax_m1", "MiniMaxText01", "MiniMaxM1")
ARCHITECTURES = ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM")

_FACTORS = {
    f"layernorm_{theirs}_{letter}": f"{ours}_{letter}_factor"
    for theirs, ours in (
        ("full_attention", "full_attn"),
        ("linear_attention", "linear_attn"),
        ("mlp", "mlp"),
    )
    for letter in ("alpha", "beta")
}
_TYPE_LISTS = ("attn_type_list", "decoder_attention_types")
_RULES = KeyRules(
    renamed={name: name for name in published.SAME_NAME} | _FACTORS,
    read=published.READ | {*_TYPE_LISTS, "postnorm", "shared_intermediate_size"},
    fixed=published.FIXED | {"shared_moe_mode": ("sigmoid",)},
    ignored=published.IGNORED,
)
_LAYER_TYPES: dict[int, LayerType] = {0: "linear_attention", 1: "full_attention"}


def read(document: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the model of an original config.json.

    Args:
        document: the file's object.
        source: the file's name, for messages.

    Returns:
        The model. As in the original code, postnorm is false and rotary_dim is head_dim where the
        file does not say.

    Raises:
        CheckpointError: a key is unknown, missing or contradicts another.
        UnsupportedError: a key asks for what we do not compute.

    Source: MiniMax-M1 config.json; vLLM model_executor/models/minimax_text_01.py.
    """
    values = published.read_common(document, _RULES, source)
    require_keys(document, ("rope_theta",), source)
    values["layer_types"] = _layer_types(document, source)
    values["rope_theta"] = document["rope_theta"]
    rotary_dim = document.get("rotary_dim")
    values["rotary_dim"] = values["head_dim"] if rotary_dim is None else rotary_dim
    values["norm_placement"] = "post_norm" if document.get("postnorm", False) else "pre_norm"
    shared = one_for_all(document, "shared_intermediate_size", source)
    values["moe"]["shared_intermediate_size"] = shared or None
    return published.finish(values, document, source)


def write(config: ModelConfig) -> dict[str, Any]:
    """Return an original config.json.

    Raises:
        UnsupportedError: the schema cannot express the model; the message names the field.
    """
    published.require_expressible(config, "minimax")
    shared = config.moe.shared_intermediate_size if config.moe is not None else None
    return {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        **published.write_common(config, _RULES),
        "attn_type_list": [int(kind == "full_attention") for kind in config.layer_types],
        "rope_theta": config.rope_theta,
        "postnorm": config.norm_placement == "post_norm",
        "shared_intermediate_size": shared or 0,
        "shared_moe_mode": "sigmoid",
    }


def _layer_types(document: Mapping[str, Any], source: str) -> list[LayerType]:
    given = {key: document[key] for key in _TYPE_LISTS if document.get(key) is not None}
    if not given:
        raise CheckpointError(f"{source}: attn_type_list must be given, got no value")
    if len(given) == 2 and given[_TYPE_LISTS[0]] != given[_TYPE_LISTS[1]]:
        raise CheckpointError(
            f"{source}: decoder_attention_types must equal attn_type_list, got another list"
        )
    key, kinds = next(iter(given.items()))
    require_layers(document, kinds, key, source)
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            raise CheckpointError(
                f"{source}: {key} must hold 0 (lightning) and 1 (softmax), got {kind!r}"
            )
    return [_LAYER_TYPES[kind] for kind in kinds]
