"""Initial weights: Xavier with DeepNorm's gains, or plain normal."""

import torch
from torch import Tensor, nn

from sevenfold.models.config import ModelConfig
from sevenfold.models.hybrid import HybridModel


def deepnorm_alpha(num_hidden_layers: int) -> float:
    """Return the weight of the residual stream, (2 N)^(1/4); arXiv 2203.00555, decoder-only."""
    return (2 * num_hidden_layers) ** 0.25


def deepnorm_beta(num_hidden_layers: int) -> float:
    """Return the gain of initial weights, (8 N)^(-1/4); arXiv 2203.00555, decoder-only."""
    return (8 * num_hidden_layers) ** -0.25


_CPU = torch.device("cpu")

# Last part of a matrix's name -> which of its rows' groups take DeepNorm's gain. The paper scales
# the value and output projections and the feed-forward; queries, keys and gates keep gain 1.
_GAINED = ("v_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj")


@torch.no_grad()
def init_weights(model: HybridModel, *, seed: int, drawn_on: torch.device = _CPU) -> HybridModel:
    """Fill every parameter, in the order of the names, from one seed.

    xavier_deepnorm: std = gain * sqrt(2 / (fan_in + fan_out)), each expert and each of q, k, v a
    matrix of its own; gain (8 N)^(-1/4) for values, outputs and feed-forward under post_norm, else
    1; embedding and router std = initializer_range. normal: std = initializer_range for all
    matrices. Norms are 1.

    Args:
        model: on any device but meta.
        seed: of the generator.
        drawn_on: where the numbers are drawn. On the CPU every device starts from the same weights;
            billions of them come faster from a GPU.

    Returns:
        The model.

    Source: arXiv 2501.08313 section 4.2; 2203.00555.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        for rows, std in _parts(name, parameter, model.config):
            noise = torch.empty(rows.shape, dtype=torch.float32, device=drawn_on)
            rows.copy_(nn.init.normal_(noise, std=std, generator=generator))
    return model


def _parts(name: str, parameter: Tensor, config: ModelConfig) -> list[tuple[Tensor, float]]:
    """The matrices that a parameter is made of, with their standard deviations."""
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if config.initialization == "normal" or kind in ("embed_tokens", "gate", "coefficient"):
        return [(parameter, config.initializer_range)]
    post_norm = config.norm_placement == "post_norm"
    gain = deepnorm_beta(config.num_hidden_layers) if post_norm else 1.0
    if kind == "qkv_proj":
        H, D = config.num_attention_heads, config.head_dim
        by_head = parameter.view(H, 3, D, -1)
        std = _xavier_std(H * D, parameter.shape[1])
        return [(by_head[:, 0], std), (by_head[:, 1], std), (by_head[:, 2], gain * std)]
    fan_out, fan_in = parameter.shape[-2:]
    fan_out = fan_out // 2 if kind == "gate_up_proj" else fan_out
    return [(parameter, (gain if kind in _GAINED else 1.0) * _xavier_std(fan_out, fan_in))]


def _xavier_std(fan_out: int, fan_in: int) -> float:
    return (2 / (fan_in + fan_out)) ** 0.5
