"""The schema of transformers' `minimax` model type."""

from collections.abc import Mapping
from typing import Any

from sevenfold.config import CheckpointError, UnsupportedError
from sevenfold.models.checkpoint import published
from sevenfold.models.checkpoint.schema import (
    KeyRules,
    require_keys,
    require_layers,
)
from sevenfold.models.config import ModelConfig

MODEL_TYPE = "minimax"
_FACTORS = tuple(
    f"{part}_{letter}_factor"
    for part in ("full_attn", "linear_attn", "mlp")
    for letter in ("alpha", "beta")
)
_RULES = KeyRules(
    renamed={name: name for name in (*published.SAME_NAME, *_FACTORS)},
    read=published.READ | {"layer_types", "rope_parameters", "partial_rotary_factor"},
    # The published `-hf` files still carry the original's keys at these values.
    fixed=published.FIXED
    | {
        "postnorm": (True,),
        "shared_intermediate_size": (0, None),
        "shared_moe_mode": ("sigmoid", "softmax"),
    },
    ignored=published.IGNORED,
)
_ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor")


def read(document: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the model of a `minimax` config.json.

    Args:
        document: the file's object.
        source: the file's name, for messages.

    Returns:
        The model. Without rotary_dim or partial_rotary_factor all of head_dim is rotated, as
        transformers does; with one of them it is honoured, as transformers does not.

    Raises:
        CheckpointError: a key is unknown, missing or contradicts another.
        UnsupportedError: a key asks for what we do not compute.

    Source: transformers 5.17.0 configuration_minimax.py; MiniMax-Text-01-hf config.json.
    """
    values = published.read_common(document, _RULES, source)
    require_keys(document, ("layer_types",), source)
    require_layers(document, document["layer_types"], "layer_types", source)
    values["layer_types"] = document["layer_types"]
    rope = _rope_table(document, source)
    values["rope_theta"] = rope["rope_theta"]
    values["rotary_dim"] = _rotary_dim(document, rope, values["head_dim"], source)
    return published.finish(values, document, source)


def write(config: ModelConfig) -> dict[str, Any]:
    """Return a `minimax` config.json.

    Raises:
        UnsupportedError: the schema cannot express the model; the message names the field.
    """
    published.require_expressible(config, "hf")
    if config.norm_placement != "post_norm":
        raise UnsupportedError(
            f"norm_placement must be 'post_norm' in format 'hf', got {config.norm_placement!r}; "
            f"format 'minimax' has a key for it"
        )
    if config.moe is not None and config.moe.shared_intermediate_size is not None:
        raise UnsupportedError(
            f"moe.shared_intermediate_size must be left out in format 'hf', "
            f"got {config.moe.shared_intermediate_size}; format 'minimax' has a key for it"
        )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_dim != config.head_dim:
        rope["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": MODEL_TYPE,
        **published.write_common(config, _RULES),
        "layer_types": list(config.layer_types),
        "rope_parameters": rope,
    }


def _rope_table(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    rope = dict(document.get("rope_parameters") or {})
    for key in rope:
        if key not in _ROPE_KEYS:
            raise UnsupportedError(
                f"{source}: rope_parameters must hold {', '.join(_ROPE_KEYS)} alone, got {key!r}"
            )
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedError(
            f"{source}: rope_parameters.rope_type must be 'default', got {kind!r}"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        outer = document.get(key)
        if outer is not None and rope.setdefault(key, outer) != outer:
            raise CheckpointError(
                f"{source}: {key} must equal rope_parameters.{key} = {rope[key]}, got {outer}"
            )
    require_keys(rope, ("rope_theta",), source)
    return rope


def _rotary_dim(
    document: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int, source: str
) -> int:
    share = rope.get("partial_rotary_factor")
    from_share = head_dim if share is None else round(head_dim * share)
    rotary_dim = document.get("rotary_dim")
    if rotary_dim is None:
        return from_share
    if share is not None and rotary_dim != from_share:
        raise CheckpointError(
            f"{source}: rotary_dim must agree with partial_rotary_factor = {share} of head_dim = "
            f"{head_dim}, got {rotary_dim}"
        )
    return rotary_dim
