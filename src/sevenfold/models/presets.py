"""Named configurations: the released model, the scaling ladder, and small ones for laptops."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from sevenfold.config import ConfigError, merge_tables, parse_config, unknown_name
from sevenfold.models.config import LayerType, ModelConfig, MoEConfig
from sevenfold.models.init import deepnorm_alpha

Form = Literal["hybrid", "softmax", "lightning"]

_GROUP = 8  # the system's rule: seven linear layers, then one full layer

# layers, hidden size, heads, head width, feed-forward width; arXiv 2406.16690 Table 2 and appendix.
# The paper prints head width 128 for 1B, where 16 heads of it would not make the width of 1536.
_LADDER = {
    "70m": (6, 512, 4, 128, 1536),
    "160m": (12, 768, 6, 128, 2048),
    "410m": (26, 1024, 8, 128, 2816),
    "1b": (32, 1536, 16, 96, 5632),
    "3b": (35, 2560, 20, 128, 6912),
    "7b": (32, 4096, 32, 128, 11008),
}


def hybrid_layers(num_hidden_layers: int) -> tuple[LayerType, ...]:
    """Return the 7:1 pattern: every eighth layer is full; below eight layers, the last one.

    Args:
        num_hidden_layers: at least 1.

    Returns:
        One layer type for each layer.
    """
    last_only = num_hidden_layers < _GROUP
    return tuple(
        "full_attention"
        if (layer == num_hidden_layers - 1 if last_only else layer % _GROUP == _GROUP - 1)
        else "linear_attention"
        for layer in range(num_hidden_layers)
    )


def preset_names() -> list[str]:
    """Return the names that preset() knows."""
    sized = [f"{size}-{form}" for size in ("nano", *_LADDER) for form in _FORMS]
    return ["nano", *sized, *_SINGLE]


def preset(name: str) -> ModelConfig:
    """Return a named configuration.

    Args:
        name: nano, 70m, 160m, 410m, 1b, 3b or 7b with -hybrid, -softmax or -lightning (nano alone
            is the hybrid); bench-19m; bench-2b; minimax-text-01.

    Returns:
        The configuration.

    Raises:
        ConfigError: there is no such name; the message names the nearest.
    """
    if name not in preset_names():
        raise ConfigError(unknown_name("preset", name, preset_names()))
    if name in _SINGLE:
        return _deepnorm(_SINGLE[name]())
    size, _, form = name.partition("-")
    layers = _FORMS[form or "hybrid"]
    return _deepnorm(_nano(layers) if size == "nano" else _ladder(size, layers))


def resolve_model(table: Mapping[str, Any], source: str) -> ModelConfig:
    """Build the configuration that a run file's [model] table describes.

    Args:
        table: `preset`, optional, and fields of ModelConfig, which are laid over it.
        source: the file's name, for messages.

    Returns:
        The configuration.

    Raises:
        ConfigError: a preset or key is unknown or missing, or a value breaks its rule.
    """
    fields = dict(table)
    name = fields.pop("preset", None)
    if name is None:
        return parse_config(ModelConfig, fields, source)
    if not isinstance(name, str):
        raise ConfigError(f"{source}: preset must be a name, got {name!r}")
    base = preset(name).model_dump(mode="json")
    return parse_config(ModelConfig, merge_tables(base, fields), source)


def _all_of(layer_type: LayerType) -> Callable[[int], tuple[LayerType, ...]]:
    return lambda num_hidden_layers: (layer_type,) * num_hidden_layers


_FORMS: dict[str, Callable[[int], tuple[LayerType, ...]]] = {
    "hybrid": hybrid_layers,
    "softmax": _all_of("full_attention"),
    "lightning": _all_of("linear_attention"),
}


def _deepnorm(config: ModelConfig) -> ModelConfig:
    alpha = deepnorm_alpha(config.num_hidden_layers)
    names = ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")
    return config.model_copy(update=dict.fromkeys(names, alpha))


def _nano(layers: Callable[[int], tuple[LayerType, ...]]) -> ModelConfig:
    return ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        layer_types=layers(_GROUP),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe=MoEConfig(num_local_experts=4),
        rotary_dim=16,
        tie_word_embeddings=True,
    )


def _ladder(size: str, layers: Callable[[int], tuple[LayerType, ...]]) -> ModelConfig:
    num_layers, hidden_size, num_heads, head_dim, intermediate_size = _LADDER[size]
    return ModelConfig(
        vocab_size=100_280,
        hidden_size=hidden_size,
        layer_types=layers(num_layers),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        rotary_dim=head_dim // 2,
        tie_word_embeddings=True,
    )


def _bench_19m() -> ModelConfig:
    return ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        layer_types=hybrid_layers(8),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        moe=MoEConfig(num_local_experts=4),
        # Full width: what transformers' MiniMax class, the peer, does.
        rotary_dim=32,
        max_position_embeddings=65_536,
    )


def _bench_2b() -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=2048,
        layer_types=hybrid_layers(16),
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=1792,
        moe=MoEConfig(num_local_experts=8),
        rotary_dim=64,
        max_position_embeddings=1_048_576,
    )


def _minimax_text_01() -> ModelConfig:
    return ModelConfig(
        vocab_size=200_064,
        hidden_size=6144,
        layer_types=hybrid_layers(80),
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9216,
        moe=MoEConfig(num_local_experts=32, router_aux_loss_coef=0.001),
        rotary_dim=64,
        rope_theta=10_000_000.0,
        max_position_embeddings=10_240_000,
        eos_token_id=200_020,
    )


_SINGLE: dict[str, Callable[[], ModelConfig]] = {
    "bench-19m": _bench_19m,
    "bench-2b": _bench_2b,
    "minimax-text-01": _minimax_text_01,
}
