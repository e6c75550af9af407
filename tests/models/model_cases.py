"""Tiny models for the tests."""

from unittest import mock

import torch

from sevenfold.models import HybridModel, LayerType, ModelConfig, MoEConfig, init_weights
from sevenfold.ops.lightning import eager as lightning_eager
from sevenfold.ops.lightning import reference as lightning_reference
from sevenfold.ops.linear import onednn

LETTERS: dict[str, LayerType] = {
    "l": "linear_attention",
    "f": "full_attention",
    "s": "sliding_attention",
}
CPU = torch.device("cpu")


def tiny_config(layers: str = "lf", window: int = 4, **fields) -> ModelConfig:
    """layers: one letter each, l linear, f full, s sliding."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 8,
        "layer_types": tuple(LETTERS[letter] for letter in layers),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "intermediate_size": 10,
        "rotary_dim": 4,
        "sliding_window": window if "s" in layers else None,
        "linear_attn_alpha_factor": 1.5,
        "full_attn_beta_factor": 0.75,
        "mlp_alpha_factor": 1.25,
    }
    return ModelConfig(**(sizes | fields))


def tiny_model(
    layers: str = "lf", dtype: torch.dtype = torch.float64, seed: int = 0, **fields
) -> HybridModel:
    """An evaluated model whose weights bf16 holds exactly, larger than initial ones."""
    model = init_weights(HybridModel(tiny_config(layers, **fields)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.25
            parameter.copy_(((parameter.dim() == 1) + scale * noise).bfloat16())
    return model.to(dtype).eval().requires_grad_(False)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(seed))


def by_other_products(model: HybridModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of whole rows by the recurrence's reference and without oneDNN: other rounding."""
    with (
        mock.patch.object(lightning_eager, "forward", lightning_reference.forward),
        mock.patch.object(onednn, "AVAILABLE", False),
    ):
        return model(input_ids)


def furthest(exact: torch.Tensor, *runs: torch.Tensor) -> torch.Tensor:
    """Element by element the honest run that is furthest from the exact one."""
    stacked = torch.stack(runs)
    at = (stacked.double() - exact).abs().argmax(0, keepdim=True)
    return stacked.gather(0, at)[0]


MOE = MoEConfig(num_local_experts=3, num_experts_per_tok=2)
