"""Initial weights: the documented standard deviation of every kind of matrix, and the seed."""

import math

import pytest
import torch
from model_cases import tiny_config
from torch import Tensor

from sevenfold.models import (
    HybridModel,
    MoEConfig,
    deepnorm_alpha,
    deepnorm_beta,
    init_weights,
)

WIDE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "rotary_dim": 8,
    "initializer_range": 0.05,
}
SHARED = MoEConfig(num_local_experts=3, shared_intermediate_size=24)


def check_std(weight: Tensor, std: float) -> None:
    """Mean and std within five standard errors of a normal sample of that many elements."""
    n = weight.numel()
    assert abs(float(weight.mean())) <= 5 * std / math.sqrt(n)
    assert abs(float(weight.square().mean().sqrt()) - std) <= 5 * std / math.sqrt(2 * n)


def built(seed: int = 0, **fields) -> dict[str, Tensor]:
    model = init_weights(HybridModel(tiny_config("lf", **(WIDE | fields))), seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


@pytest.mark.parametrize("placement", ["post_norm", "pre_norm"])
def test_xavier_with_deepnorm_gains(placement: str) -> None:
    gain = 16**-0.25 if placement == "post_norm" else 1.0  # (8 * 2 layers)^(-1/4)
    weights = built(norm_placement=placement)
    linear, full = "layers.0.self_attn.", "layers.1.self_attn."
    by_head = weights[linear + "qkv_proj.weight"].view(4, 3, 16, 48)
    for head in range(4):
        check_std(by_head[head, 0], xavier(48, 64))
        check_std(by_head[head, 1], xavier(48, 64))
        check_std(by_head[head, 2], gain * xavier(48, 64))
    check_std(weights[linear + "output_gate.weight"], xavier(48, 64))
    check_std(weights[linear + "out_proj.weight"], gain * xavier(64, 48))
    check_std(weights[full + "q_proj.weight"], xavier(48, 64))
    check_std(weights[full + "k_proj.weight"], xavier(48, 32))
    check_std(weights[full + "v_proj.weight"], gain * xavier(48, 32))
    check_std(weights[full + "o_proj.weight"], gain * xavier(64, 48))
    check_std(weights["layers.0.mlp.gate_up_proj.weight"], gain * xavier(48, 40))
    check_std(weights["layers.1.mlp.down_proj.weight"], gain * xavier(40, 48))
    check_std(weights["embed_tokens.weight"], 0.05)
    check_std(weights["lm_head.weight"], xavier(48, 97))


def test_each_expert_is_a_matrix_of_its_own() -> None:
    gain, weights = 16**-0.25, built(moe=SHARED)
    for expert in range(3):
        check_std(weights["layers.0.mlp.experts.gate_up_proj"][expert], gain * xavier(48, 40))
        check_std(weights["layers.0.mlp.experts.down_proj"][expert], gain * xavier(40, 48))
    check_std(weights["layers.0.mlp.shared_mlp.gate_up_proj.weight"], gain * xavier(48, 24))
    check_std(weights["layers.0.mlp.shared_mlp.down_proj.weight"], gain * xavier(24, 48))
    check_std(weights["layers.0.mlp.gate.weight"], 0.05)
    check_std(weights["layers.0.mlp.coefficient.weight"], 0.05)


def test_normal_takes_one_std_for_all() -> None:
    weights = built(initialization="normal", moe=SHARED)
    for weight in weights.values():
        if weight.dim() > 1:
            check_std(weight, 0.05)
    assert len(weights) == 27


def test_norms_start_at_one() -> None:
    norms = {name: w for name, w in built().items() if "norm" in name}
    assert len(norms) == 6
    assert all(bool((w == 1).all()) for w in norms.values())


def test_a_tied_head_keeps_the_embeddings_std() -> None:
    weights = built(tie_word_embeddings=True)
    assert "lm_head.weight" not in weights
    check_std(weights["embed_tokens.weight"], 0.05)


def test_the_seed_decides_everything() -> None:
    torch.manual_seed(1)
    first = built(seed=7)
    torch.manual_seed(2)
    again, other = built(seed=7), built(seed=8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_the_global_generator_is_left_alone() -> None:
    model = HybridModel(tiny_config("lf", **WIDE))
    before = torch.get_rng_state()
    init_weights(model, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_low_precision_model_gets_the_same_weights_rounded() -> None:
    model = HybridModel(tiny_config("lf", **WIDE)).bfloat16()
    rounded = dict(init_weights(model, seed=7).named_parameters())
    for name, weight in built(seed=7).items():
        assert torch.equal(rounded[name], weight.bfloat16())


def test_deepnorm_factors_of_the_released_model() -> None:
    assert f"{deepnorm_alpha(80):.12f}" == "3.556558820078"
    assert f"{deepnorm_alpha(80) * deepnorm_beta(80):.12f}" == f"{0.25**0.25:.12f}"
    assert deepnorm_beta(2) == 0.5
