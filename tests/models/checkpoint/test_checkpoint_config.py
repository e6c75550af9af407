"""config.json in three schemas: what is read, what is refused, and how the refusal reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import (
    FULL,
    LINEAR,
    SLIDING,
    edit_config,
    random_model,
    remove_keys,
    tiny_config,
)

from sevenfold.config import CheckpointError, UnsupportedError
from sevenfold.models import ModelConfig, MoEConfig
from sevenfold.models.checkpoint import detect_format, read_config, save_model

ALPHA = 3.5565588200778455

# The published files' keys and values, without their 80-fold lists.
SHARED_KEYS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 10240000,
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
ORIGINAL = SHARED_KEYS | {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "auto_map": {"AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM"},
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "layernorm_full_attention_alpha": ALPHA,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": ALPHA,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": ALPHA,
    "layernorm_mlp_beta": 1.0,
}
CONVERTED = SHARED_KEYS | {
    "architectures": ["MiniMaxForCausalLM"],
    "model_type": "minimax",
    "layer_types": ([LINEAR] * 7 + [FULL]) * 10,
    "full_attn_alpha_factor": ALPHA,
    "full_attn_beta_factor": 1.0,
    "linear_attn_alpha_factor": ALPHA,
    "linear_attn_beta_factor": 1.0,
    "mlp_alpha_factor": ALPHA,
    "mlp_beta_factor": 1.0,
    "block_size": 256,
}
TEXT_01 = ModelConfig(
    vocab_size=200064,
    hidden_size=6144,
    layer_types=((LINEAR,) * 7 + (FULL,)) * 10,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=9216,
    moe=MoEConfig(num_local_experts=32, router_aux_loss_coef=0.001),
    rotary_dim=64,
    rope_theta=1e7,
    full_attn_alpha_factor=ALPHA,
    linear_attn_alpha_factor=ALPHA,
    mlp_alpha_factor=ALPHA,
    max_position_embeddings=10_240_000,
    eos_token_id=200020,
)


def write(folder: Path, document: dict[str, Any], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(document | changes))
    return folder


def without(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in keys}


@pytest.mark.parametrize(("document", "format"), [(ORIGINAL, "minimax"), (CONVERTED, "hf")])
def test_the_published_configs_read(tmp_path: Path, document, format) -> None:
    write(tmp_path, document)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [200020]}')
    assert detect_format(tmp_path) == format
    assert read_config(tmp_path) == TEXT_01
    assert read_config(tmp_path / "config.json") == TEXT_01


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "MiniMaxText01", "architectures": None},
        {"model_type": "minimax_text_01", "architectures": ["MiniMaxText01ForCausalLM"]},
        {"model_type": "minimax", "architectures": ["MiniMaxText01ForCausalLM"]},
    ],
)
def test_other_spellings_of_the_original(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path, ORIGINAL, **changes)
    assert detect_format(tmp_path) == "minimax"


def test_what_the_original_leaves_out(tmp_path: Path) -> None:
    document = without(ORIGINAL, "attn_type_list", "postnorm", "rotary_dim", "head_dim")
    types = [1, 0] * 40
    config = read_config(write(tmp_path, document, decoder_attention_types=types))
    assert config.layer_types == (FULL, LINEAR) * 40
    assert config.norm_placement == "pre_norm"
    assert (config.head_dim, config.rotary_dim) == (96, 96)


def test_a_list_over_layers(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, ORIGINAL, shared_intermediate_size=[1024] * 80))
    assert config.moe is not None
    assert config.moe.shared_intermediate_size == 1024
    write(tmp_path, ORIGINAL, shared_intermediate_size=[1024] * 79 + [0])
    with pytest.raises(
        UnsupportedError, match=r"shared_intermediate_size must be the same in ever"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("rope", "rotary_dim"),
    [
        ({"rope_theta": 1e7}, 128),
        ({"rope_theta": 1e7, "rotary_dim": 64}, 64),
        ({"rope_theta": 1e7, "partial_rotary_factor": 0.25}, 32),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}, 128),
        ({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5}}, 64),
        ({"rope_parameters": {"rope_theta": 1e7}, "rope_theta": 1e7, "rotary_dim": 64}, 64),
    ],
)
def test_how_much_is_rotated(tmp_path: Path, rope: dict[str, Any], rotary_dim: int) -> None:
    document = without(CONVERTED, "rope_theta", "rotary_dim")
    config = read_config(write(tmp_path, document, **rope))
    assert (config.rope_theta, config.rotary_dim) == (1e7, rotary_dim)


BROKEN = [
    (
        CONVERTED,
        {"hiden_size": 5},
        CheckpointError,
        r"json: key must be a known name, got 'hiden_size'; did you mean 'hidden_size'\?",
    ),
    (
        ORIGINAL,
        {"layernorm_mlp_alhpa": 1},
        CheckpointError,
        r"did you mean 'layernorm_mlp_alpha'\?",
    ),
    (
        CONVERTED,
        {"attn_type_list": [0]},
        CheckpointError,
        r"key must be a known name, got 'attn_type_list'",
    ),
    (
        CONVERTED,
        {"hidden_act": "gelu"},
        UnsupportedError,
        r"hidden_act must be \"silu\", got 'gelu'",
    ),
    (CONVERTED, {"sliding_window": 512}, UnsupportedError, r"sliding_window must be null, got 512"),
    (
        CONVERTED,
        {"attention_dropout": 0.1},
        UnsupportedError,
        r"attention_dropout must be 0.0, got 0.1",
    ),
    (CONVERTED, {"router_jitter_noise": 0.1}, UnsupportedError, r"router_jitter_noise must be 0.0"),
    (CONVERTED, {"rope_scaling": {"type": "yarn"}}, UnsupportedError, r"rope_scaling must be null"),
    (CONVERTED, {"postnorm": False}, UnsupportedError, r"postnorm must be true, got False"),
    (
        CONVERTED,
        {"shared_intermediate_size": 8},
        UnsupportedError,
        r"shared_intermediate_size must be 0 or null",
    ),
    (
        ORIGINAL,
        {"shared_moe_mode": "softmax"},
        UnsupportedError,
        r"shared_moe_mode must be \"sigmoid\"",
    ),
    (
        CONVERTED,
        {"layer_types": [LINEAR]},
        CheckpointError,
        r"layer_types must have num_hidden_layers = 80 entries, got 1",
    ),
    (CONVERTED, {"layer_types": None}, CheckpointError, r"layer_types must be given, got no value"),
    (
        CONVERTED,
        {"layer_types": ["mamba"] * 80},
        CheckpointError,
        r"config.json: layer_types.0 must be valid",
    ),
    (
        CONVERTED,
        {"vocab_size": None, "rms_norm_eps": None},
        CheckpointError,
        r"vocab_size, rms_norm_eps must be given",
    ),
    (
        CONVERTED,
        {"vocab_size": "many"},
        CheckpointError,
        r"vocab_size must be valid: .*, got 'many'",
    ),
    (CONVERTED, {"num_key_value_heads": 7}, CheckpointError, r"num_key_value_heads must divide"),
    (CONVERTED, {"rope_theta": None}, CheckpointError, r"rope_theta must be given"),
    (ORIGINAL, {"rope_theta": None}, CheckpointError, r"rope_theta must be given"),
    (
        CONVERTED,
        {"rope_parameters": {"rope_theta": 5.0}},
        CheckpointError,
        r"rope_theta must equal rope_parameters.rope_theta = 5.0",
    ),
    (
        CONVERTED,
        {"rope_parameters": {"rope_type": "yarn"}},
        UnsupportedError,
        r"rope_parameters.rope_type must be 'default', got 'yarn'",
    ),
    (
        CONVERTED,
        {"rope_parameters": {"factor": 2}},
        UnsupportedError,
        r"rope_parameters must hold .* alone, got 'factor'",
    ),
    (
        CONVERTED,
        {"partial_rotary_factor": 0.25},
        CheckpointError,
        r"rotary_dim must agree with partial_rotary_factor = 0.25",
    ),
    (
        CONVERTED,
        {"eos_token_id": [1, 2]},
        CheckpointError,
        r"eos_token_id must be one id, got \[1, 2\]; keep",
    ),
    (ORIGINAL, {"attn_type_list": None}, CheckpointError, r"attn_type_list must be given"),
    (
        ORIGINAL,
        {"attn_type_list": [2] * 80},
        CheckpointError,
        r"must hold 0 \(lightning\) and 1 \(softmax\), got 2",
    ),
    (
        ORIGINAL,
        {"attn_type_list": [0, 1]},
        CheckpointError,
        r"attn_type_list must have num_hidden_layers = 80 entries, got 2",
    ),
    (
        ORIGINAL,
        {"decoder_attention_types": [0] * 80},
        CheckpointError,
        r"decoder_attention_types must equal attn_type_list",
    ),
    (
        CONVERTED,
        {"model_type": "mixtral", "architectures": None},
        CheckpointError,
        r"model_type must be one of minimax, .*, got 'mixtral'",
    ),
    (
        CONVERTED,
        {"sevenfold": {"capacity_fator": 1}},
        CheckpointError,
        r"sevenfold key must be a known name, got 'capacity_fator'; did you mean 'capacity_factor'",
    ),
]


@pytest.mark.parametrize(("document", "changes", "error", "message"), BROKEN)
def test_a_broken_config_is_named(tmp_path: Path, document, changes, error, message: str) -> None:
    write(tmp_path, document, **changes)
    with pytest.raises(error, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


OURS_BROKEN = [
    ({"version": 2}, r"version must be 1, got 2; a newer version needs a newer sevenfold"),
    ({"modle": 1}, r"key must be a known name, got 'modle'; did you mean 'model'\?"),
    ({"model": 3}, r"model must be a table, got 3"),
    ({"model": {"hiden_size": 3}}, r"hiden_size is not a known key; did you mean hidden_size\?"),
]


@pytest.mark.parametrize(("changes", "message"), OURS_BROKEN)
def test_our_own_config_is_as_strict(tmp_path: Path, changes, message: str) -> None:
    save_model(random_model(tiny_config()), tmp_path / "a")
    edit_config(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path / "a")


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json must be readable, got: No such file"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json must be JSON, got"):
        read_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json must hold a JSON object, got list"):
        read_config(tmp_path)


def test_a_broken_end_of_sequence_in_the_generation_config(tmp_path: Path) -> None:
    write(tmp_path, ORIGINAL)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be one"):
        read_config(tmp_path)


INEXPRESSIBLE = [
    ({"moe": None}, "hf", r"moe must have a key in format 'hf', got None"),
    ({"moe": None}, "minimax", r"moe must have a key in format 'minimax', got None"),
    ({"norm_placement": "pre_norm"}, "hf", r"norm_placement must be 'post_norm' in format 'hf'"),
    ({"linear_attn_norm_eps": 1e-5}, "hf", r"linear_attn_norm_eps must have a key in format 'hf'"),
    (
        {"linear_attn_norm_groups": 2},
        "minimax",
        r"linear_attn_norm_groups must have a key in format 'minimax', got 2",
    ),
    ({"rotary_dim": 0}, "minimax", r"rotary_dim must have a key in format 'minimax', got 0"),
    (
        {"moe": MoEConfig(num_local_experts=3, shared_intermediate_size=8)},
        "hf",
        r"moe.shared_intermediate_size must be left out in format 'hf', got 8; format 'minimax'",
    ),
    (
        {"layer_types": (LINEAR, SLIDING), "sliding_window": 4},
        "minimax",
        r"layer_types must have a key in format 'minimax'",
    ),
]


@pytest.mark.parametrize(("changes", "format", "message"), INEXPRESSIBLE)
def test_what_a_schema_cannot_say_is_not_saved(tmp_path: Path, changes, format, message) -> None:
    model = random_model(tiny_config(**changes))
    with pytest.raises(UnsupportedError, match=message):
        save_model(model, tmp_path / "a", format=format)
    assert list(tmp_path.iterdir()) == []


def test_keys_that_change_nothing_are_ignored(tmp_path: Path) -> None:
    config = tiny_config()
    save_model(random_model(config), tmp_path / "a", format="hf")
    edit_config(tmp_path / "a", block_size=64, use_cache=False, pad_token_id=0, _name_or_path="x")
    assert read_config(tmp_path / "a") == config


def test_defaults_of_a_sparse_config(tmp_path: Path) -> None:
    config = tiny_config(moe=MoEConfig(num_local_experts=3, router_aux_loss_coef=0.001))
    save_model(random_model(config), tmp_path / "a", format="hf")
    remove_keys(tmp_path / "a", "router_aux_loss_coef", "mlp_beta_factor", "sevenfold")
    remove_keys(tmp_path / "a", "rotary_dim", "hidden_act")
    assert read_config(tmp_path / "a") == config
