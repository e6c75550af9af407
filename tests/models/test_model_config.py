"""What a configuration refuses, and what it derives."""

import re

import pytest
from model_cases import tiny_config

from sevenfold.config import ConfigError, parse_config
from sevenfold.models import ModelConfig, MoEConfig

VALUES = tiny_config("lf").model_dump(mode="json")


def test_a_configuration_survives_json() -> None:
    config = tiny_config("lsf", moe=MoEConfig(num_local_experts=4, capacity_factor=1.5))
    assert parse_config(ModelConfig, config.model_dump(mode="json"), "config.json") == config


def test_layers_are_counted() -> None:
    config = tiny_config("lllsf")
    assert config.num_hidden_layers == 5
    kinds = ("linear_attention", "full_attention", "sliding_attention")
    assert [config.count(kind) for kind in kinds] == [3, 1, 1]


def test_residual_factors_by_kind_of_layer() -> None:
    config = tiny_config(
        linear_attn_alpha_factor=2.0,
        linear_attn_beta_factor=3.0,
        full_attn_alpha_factor=5.0,
        full_attn_beta_factor=7.0,
    )
    assert config.residual_factors("linear_attention") == (2.0, 3.0)
    assert config.residual_factors("full_attention") == (5.0, 7.0)
    assert config.residual_factors("sliding_attention") == (5.0, 7.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads = 4, got 3",
        ),
        (
            {"linear_attn_norm_groups": 3},
            "linear_attn_norm_groups must divide num_attention_heads = ",
        ),
        ({"rotary_dim": 8}, "rotary_dim must not exceed head_dim = 6, got 8"),
        ({"rotary_dim": 3}, "rotary_dim must be valid: Input should be a multiple of 2, got 3"),
        ({"rotary_dim": -2}, "rotary_dim must be valid: Input should be greater than or equal to"),
        (
            {"sliding_window": 4},
            "sliding_window must be left out without sliding_attention layers, got 4",
        ),
        (
            {"layer_types": ["sliding_attention"]},
            "sliding_window must be given with sliding_attention layers, got None",
        ),
        ({"layer_types": []}, "layer_types must be valid: "),
        ({"layer_types": ["mamba"]}, "layer_types.0 must be valid: Input should be 'linear_atten"),
        ({"hidden_size": 0}, "hidden_size must be valid: Input should be greater than or equal t"),
        ({"rope_theta": 0.0}, "rope_theta must be valid: Input should be greater than 0, got 0.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be valid: Input should be greater than 0"),
        ({"norm_placement": "post"}, "norm_placement must be valid: Input should be 'post_norm' "),
        ({"initialization": "he"}, "initialization must be valid: Input should be 'xavier_deepno"),
        ({"num_heads": 2}, "num_heads is not a known key; did you mean num_"),
        (
            {"moe": {"num_local_experts": 2, "num_experts_per_tok": 3}},
            "num_experts_per_tok must not exceed num_local_experts = 2, got 3",
        ),
        ({"moe": {"num_experts_per_tok": 1}}, "moe.num_local_experts must be given"),
        (
            {"moe": {"num_local_experts": 2, "capacity_factor": 0.0}},
            "moe.capacity_factor must be valid: Input should be greater than 0, got 0.0",
        ),
        (
            {"moe": {"num_local_experts": 2, "router_aux_loss_coef": -1.0}},
            "moe.router_aux_loss_coef must be valid: Input should be greater than or equal to 0",
        ),
        (
            {"moe": {"num_local_experts": 2, "shared_intermediate_size": 0}},
            "moe.shared_intermediate_size must be valid: Input should be greater than or equal to",
        ),
    ],
    ids=lambda x: str(x)[:50],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(ModelConfig, VALUES | changes, "run.toml")
