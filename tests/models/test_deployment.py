"""A model on several devices: the published plan of MiniMax-Text-01, counted and built on meta."""

import pytest
import torch

from sevenfold.config import ConfigError
from sevenfold.engine.quantised_weights import exchange_weights
from sevenfold.models import HybridModel, ModelConfig, MoEConfig, preset
from sevenfold.models.accounting import WeightFormat, state_bytes, weight_bytes, weight_scale_bytes
from sevenfold.models.checkpoint.parts import stored_dtype
from sevenfold.models.deployment import plan_deployment

TEXT_01 = preset("minimax-text-01")
META = torch.device("meta")


def shared_expert() -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        hidden_size=24,
        layer_types=("linear_attention", "full_attention", "linear_attention"),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=20,
        rotary_dim=4,
        moe=MoEConfig(num_local_experts=3, num_experts_per_tok=2, shared_intermediate_size=12),
        tie_word_embeddings=True,
    )


def on_meta(config: ModelConfig, weights: WeightFormat | None) -> HybridModel:
    with META:
        model = HybridModel(config)
    if weights is not None:
        exchange_weights(model, weights)
    return model


def bytes_of(model: HybridModel, dtype: torch.dtype) -> int:
    named = model.named_parameters()
    held = sum(x.numel() * stored_dtype(name, dtype).itemsize for name, x in named)
    return held + sum(x.nbytes for x in model.buffers())


@pytest.mark.parametrize("weights", [None, "int8-experts", "int8", "fp8-experts", "fp8"])
@pytest.mark.parametrize("name", ["minimax-text-01", "bench-2b", "nano-softmax", "shared"])
def test_weight_bytes_are_those_of_the_model(name: str, weights: WeightFormat | None) -> None:
    config = shared_expert() if name == "shared" else preset(name)
    model = on_meta(config, weights)
    assert bytes_of(model, torch.bfloat16) == weight_bytes(config, weights)
    assert bytes_of(model, torch.float32) == weight_bytes(config, weights, 4)
    scales = sum(x.nbytes for key, x in model.named_buffers() if key.endswith("scale"))
    assert scales == weight_scale_bytes(config, weights)


def test_the_released_model_on_eight_devices_of_80_gb() -> None:
    """Its makers' claim: int8 weights and more than 1M tokens of context on one such node.

    Worked by hand: 456.1e9 parameters, of them 2 x 200,064 x 6,144 of embedding and head in bf16,
    divided as all matrices are. tests/parallel/test_served_rank.py builds a rank of it.
    """
    node = {"num_devices": 8, "device_bytes": 80 * 10**9}
    assert not plan_deployment(TEXT_01, **node).fits
    for weights, least, tokens in (
        ("int8", 57.3e9, 2_796_427),
        ("int8-experts", 59.6e9, 2_340_955),
    ):
        plan = plan_deployment(TEXT_01, **node, weights=weights)
        # An eighth of the whole, and what is whole on each device: scales, norms and routers.
        assert plan.weight_bytes >= least > weight_bytes(TEXT_01, weights) / 8 - 0.2e9
        assert plan.weight_bytes <= weight_bytes(TEXT_01, weights) / 8 + 0.3e9
        assert plan.kv_bytes_per_token == 40_960 // 8
        assert plan.state_bytes == state_bytes(TEXT_01) // 8
        assert plan.reserved_bytes == 8 * 10**9
        assert plan.context_tokens == tokens > 2**20
        assert plan.free_bytes >= plan.state_bytes + 2**20 * plan.kv_bytes_per_token


def test_what_a_device_holds() -> None:
    config = shared_expert()
    one = plan_deployment(config, num_devices=1, device_bytes=10**6, reserved_share=0)
    assert one.weight_bytes == weight_bytes(config)
    assert one.kv_bytes_per_token == 2 * 2 * 8 * 2
    # Four devices share two key-value heads: each holds one, whole.
    four = plan_deployment(config, num_devices=4, device_bytes=10**6, reserved_share=0)
    assert four.kv_bytes_per_token == one.kv_bytes_per_token // 2
    assert one.weight_bytes / 4 < four.weight_bytes < one.weight_bytes
    linear = plan_deployment(preset("nano-lightning"), num_devices=2, device_bytes=10**9)
    assert linear.fits
    assert linear.context_tokens is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_devices": 3}, "num_devices must divide num_attention_heads = 64, got 3"),
        ({"num_devices": 0}, "num_devices must divide num_attention_heads = 64, got 0"),
        ({"reserved_share": 1.0}, "reserved_share must lie in 0 to below 1, got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_deployment(TEXT_01, **({"num_devices": 8, "device_bytes": 1} | options))
