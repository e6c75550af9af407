"""What the two published schemas have in common."""

from collections.abc import Mapping
from typing import Any

from sevenfold.config import CheckpointError, UnsupportedError
from sevenfold.models.checkpoint.extra import extra_table, with_extra
from sevenfold.models.checkpoint.schema import (
    EXTRA_KEY,
    CheckpointFormat,
    KeyRules,
    build_config,
    one_for_all,
    require_keys,
)
from sevenfold.models.config import ModelConfig

SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)
READ = frozenset(
    {
        "num_hidden_layers",
        "num_local_experts",
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "rope_theta",
        "rotary_dim",
    }
)
# Options that neither schema's checkpoints use; other values would change what a model computes.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "attention_bias": (False,),
    "router_jitter_noise": (0.0,),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "is_encoder_decoder": (False,),
}
# block_size and block: how the lightning sum is chunked, which does not change it.
IGNORED = frozenset(
    {
        "architectures",
        "auto_map",
        "block",
        "block_size",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "_attn_implementation",
    }
)
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "rms_norm_eps",
    "max_position_embeddings",
)
# The default of both schemas' configuration classes.
_AUX_LOSS = 0.001


def read_common(document: Mapping[str, Any], rules: KeyRules, source: str) -> dict[str, Any]:
    """Check every key, and return ModelConfig's values as far as both schemas agree on them.

    Raises:
        CheckpointError: a key is unknown or missing, or num_local_experts is 1.
        UnsupportedError: a key asks for what we do not compute.
    """
    rules.check(document, source)
    require_keys(document, _REQUIRED, source)
    values = {
        ours: document[theirs] for theirs, ours in rules.renamed.items() if theirs in document
    }
    if values.get("head_dim") is None:
        values["head_dim"] = document["hidden_size"] // document["num_attention_heads"]
    values["eos_token_id"] = single_id(document.get("eos_token_id"), source)
    values["moe"] = {
        "num_local_experts": one_for_all(document, "num_local_experts", source),
        "num_experts_per_tok": document["num_experts_per_tok"],
        "router_aux_loss_coef": document.get("router_aux_loss_coef", _AUX_LOSS),
    }
    return values


def finish(values: dict[str, Any], document: Mapping[str, Any], source: str) -> ModelConfig:
    """Add what only training reads, and validate."""
    return build_config(with_extra(values, document, source), source)


def single_id(value: Any, source: str) -> int | None:
    """Return an end-of-sequence id that may be written as a list of one.

    Raises:
        CheckpointError: there are several, or it is no number.
    """
    only = value[0] if isinstance(value, list) and len(value) == 1 else value
    if only is None or isinstance(only, int):
        return only
    raise CheckpointError(
        f"{source}: eos_token_id must be one id, got {value}; "
        f"keep the one that ends an answer and pass the others as stop tokens"
    )


def write_common(config: ModelConfig, rules: KeyRules) -> dict[str, Any]:
    """Return the keys that both schemas share, and our own table of what only training reads."""
    assert config.moe is not None, "require_expressible comes first"
    document = {theirs: getattr(config, ours) for theirs, ours in rules.renamed.items()}
    document |= {
        "num_hidden_layers": config.num_hidden_layers,
        "num_local_experts": config.moe.num_local_experts,
        "num_experts_per_tok": config.moe.num_experts_per_tok,
        "router_aux_loss_coef": config.moe.router_aux_loss_coef,
        "rotary_dim": config.rotary_dim,
        EXTRA_KEY: extra_table(config),
    }
    return document | {key: FIXED[key][0] for key in ("hidden_act", "attention_dropout")}


def require_expressible(config: ModelConfig, to: CheckpointFormat) -> None:
    """Raise UnsupportedError, naming the field, where neither schema has a key for it."""
    faults = {
        "layer_types": "sliding_attention" in config.layer_types,
        "moe": config.moe is None,
        "linear_attn_norm_eps": config.linear_attn_norm_eps != 1e-6,
        "linear_attn_norm_groups": config.linear_attn_norm_groups != 1,
        "rotary_dim": config.rotary_dim == 0 and "full_attention" in config.layer_types,
    }
    for field, is_fault in faults.items():
        if is_fault:
            value = getattr(config, field)
            raise UnsupportedError(f"{field} must have a key in format {to!r}, got {value!r}")
