"""Tiny models with every weight random, and files to spoil."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sevenfold.models import HybridModel, ModelConfig, MoEConfig

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
FORMATS = ("sevenfold", "hf", "minimax")


def tiny_config(**changes: Any) -> ModelConfig:
    """Four layers, four heads, three experts; any field may be changed."""
    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "layer_types": (LINEAR, LINEAR, LINEAR, FULL),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 24,
        "moe": MoEConfig(num_local_experts=3, num_experts_per_tok=2),
        "rotary_dim": 8,
        "rope_theta": 1e7,
        "full_attn_alpha_factor": 1.7,
        "linear_attn_alpha_factor": 1.5,
        "linear_attn_beta_factor": 0.75,
        "mlp_alpha_factor": 1.25,
        "max_position_embeddings": 4096,
        "bos_token_id": 3,
        "eos_token_id": 5,
    }
    return ModelConfig(**(values | changes))


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> HybridModel:
    """Every parameter random, norms around 1; routers at least fp32."""
    model = HybridModel(config).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1
            # Widths near 1 / sqrt(fan-in), so that every term of the model counts.
            value = 1 + 0.3 * noise if is_norm else noise * parameter.shape[-1] ** -0.5
            if name.endswith((".mlp.gate.weight", ".mlp.coefficient.weight")):
                parameter.data = value.to(torch.promote_types(dtype, torch.float32))
            else:
                parameter.copy_(value)
    return model.eval()


def random_ids(config: ModelConfig, num_tokens: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (1, num_tokens), generator=generator)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(document))


def remove_keys(folder: Path, *keys: str) -> None:
    file = folder / "config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in document.items() if k not in keys}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)
