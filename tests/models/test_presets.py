"""Named configurations: the published sizes, the pattern of layers, and what a run file may say."""

import re

import pytest
import torch
from model_cases import tiny_config

from sevenfold.config import ConfigError
from sevenfold.models import HybridModel, deepnorm_alpha, preset, preset_names, resolve_model
from sevenfold.models.accounting import count_parameters
from sevenfold.models.presets import hybrid_layers

LADDER = ("70m", "160m", "410m", "1b", "3b", "7b")
# Total and active parameters, the active without embedding, head and norms.
PUBLISHED = {
    "minimax-text-01": (456_089_655_296, 45_943_357_440),
    "bench-2b": (1_855_289_344, 667_156_480),
    "bench-19m": (19_249_152, 8_757_248),
}


def test_the_names() -> None:
    sized = {f"{size}-{form}" for size in ("nano", *LADDER) for form in FORMS}
    assert set(preset_names()) == {"nano", *sized, *PUBLISHED}
    assert len(preset_names()) == len(set(preset_names()))
    assert preset("nano") == preset("nano-hybrid")


FORMS = {"hybrid": "7:1", "softmax": "full_attention", "lightning": "linear_attention"}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_and_has_the_parameters_that_are_counted(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = HybridModel(config)
    counted = count_parameters(config)
    assert sum(p.numel() for p in model.parameters()) == counted.total
    if name in PUBLISHED:
        assert (counted.total, counted.active) == PUBLISHED[name]


@pytest.mark.parametrize("name", preset_names())
def test_alphas_are_deepnorms(name: str) -> None:
    config = preset(name)
    alpha = (2 * config.num_hidden_layers) ** 0.25
    assert config.full_attn_alpha_factor == config.linear_attn_alpha_factor == alpha
    assert config.mlp_alpha_factor == deepnorm_alpha(config.num_hidden_layers) == alpha
    betas = (config.full_attn_beta_factor, config.linear_attn_beta_factor, config.mlp_beta_factor)
    assert betas == (1.0, 1.0, 1.0)
    assert config.norm_placement == "post_norm"


@pytest.mark.parametrize("size", ["nano", *LADDER])
def test_the_three_forms_differ_in_their_layers_alone(size: str) -> None:
    hybrid, softmax, lightning = (preset(f"{size}-{form}") for form in FORMS)
    number = hybrid.num_hidden_layers
    assert hybrid.layer_types == hybrid_layers(number)
    assert softmax.layer_types == ("full_attention",) * number
    assert lightning.layer_types == ("linear_attention",) * number
    for other in (softmax, lightning):
        assert other.model_copy(update={"layer_types": hybrid.layer_types}) == hybrid


def test_minimax_text_01_is_the_released_configuration() -> None:
    """The release's config.json, in the spelling of transformers' port."""
    config = preset("minimax-text-01")
    assert config.linear_attn_alpha_factor == 3.5565588200778455
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [7, 15, 23, 31, 39, 47, 55, 63, 71, 79]
    assert config.count("linear_attention") == 70
    sizes = (config.hidden_size, config.intermediate_size, config.vocab_size)
    assert sizes == (6144, 9216, 200_064)
    assert (config.num_attention_heads, config.num_key_value_heads) == (64, 8)
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (128, 64, 1e7)
    assert config.moe is not None
    assert (config.moe.num_local_experts, config.moe.num_experts_per_tok) == (32, 2)
    assert (config.moe.shared_intermediate_size, config.moe.router_aux_loss_coef) == (None, 0.001)
    assert (config.max_position_embeddings, config.eos_token_id) == (10_240_000, 200_020)
    assert (config.rms_norm_eps, config.linear_attn_norm_eps) == (1e-5, 1e-6)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("number", [*range(1, 18), 80])
def test_every_eighth_layer_is_full_and_below_eight_the_last(number: int) -> None:
    letters = "".join(kind[0] for kind in hybrid_layers(number))
    expected = ("lllllllf" * 10)[:number] if number >= 8 else "l" * (number - 1) + "f"
    assert letters == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("nano-hybird", "nano-hybrid"),
        ("bench-2B", "bench-2b"),
        ("minimax-text-1", "minimax-text-01"),
    ],
)
def test_an_unknown_preset_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"preset.*{name}.*{nearest}"):
        preset(name)
    with pytest.raises(ConfigError, match=f"preset.*{name}.*{nearest}"):
        resolve_model({"preset": name}, "run.toml: model")


def test_an_overlay_changes_its_fields_alone() -> None:
    base = preset("bench-19m")
    assert resolve_model({"preset": "bench-19m"}, "run.toml") == base
    table = {"preset": "bench-19m", "vocab_size": 100, "moe": {"num_local_experts": 6}}
    found = resolve_model(table, "run.toml")
    assert base.moe is not None
    moe = base.moe.model_copy(update={"num_local_experts": 6})
    assert found == base.model_copy(update={"vocab_size": 100, "moe": moe})
    assert table["preset"] == "bench-19m"  # the caller's table stays as it was


def test_a_table_without_a_preset_is_a_configuration() -> None:
    config = tiny_config()
    assert resolve_model(config.model_dump(mode="json"), "run.toml") == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"preset": 3}, "run.toml: preset must be a name, got 3"),
        ({"preset": "nano", "hiden_size": 8}, "run.toml: hiden_size is not a known key; did you "),
        ({"preset": "nano", "moe": {"experts": 8}}, "run.toml: moe.experts is not a known key"),
        ({"preset": "nano", "num_key_value_heads": 3}, "run.toml: num_key_value_heads must divide"),
        ({"vocab_size": 8}, "hidden_size must be given"),
    ],
)
def test_overlays_that_break_a_rule(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve_model(table, "run.toml")
