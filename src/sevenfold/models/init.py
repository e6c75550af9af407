"""Initial weights: Xavier with DeepNorm's gains, or plain normal."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

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
    """Fill every parameter from one seed; see initial_weight.

    Args:
        model: on any device but meta.
        seed: of the run.
        drawn_on: where the numbers are drawn. On the CPU every device starts from the same weights;
            billions of them come faster from a GPU.

    Returns:
        The model.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 3:
            drawn = initial_weight(
                name, parameter.shape, model.config, seed=seed, drawn_on=drawn_on
            )
            parameter.copy_(drawn)
            continue
        for expert, matrix in enumerate(parameter):
            drawn = initial_weight(
                name, matrix.shape, model.config, seed=seed, expert=expert, drawn_on=drawn_on
            )
            matrix.copy_(drawn)
    return model


def initial_weight(
    name: str,
    shape: Sequence[int],
    config: ModelConfig,
    *,
    seed: int,
    expert: int | None = None,
    drawn_on: torch.device = _CPU,
) -> Tensor:
    """Return the initial values of one parameter, or of one expert's matrix in a stack.

    xavier_deepnorm: std = gain * sqrt(2 / (fan_in + fan_out)), each of q, k, v a matrix of its own;
    gain (8 N)^(-1/4) for values, outputs and feed-forward under post_norm, else 1; embedding and
    router std = initializer_range. normal: std = initializer_range for all matrices. Norms are 1.

    Each matrix has a generator of its own, seeded by the run's seed and its name: so a rank draws
    what it holds and nothing else, and every layout begins with the same weights.

    Args:
        name: of the parameter in HybridModel.
        shape: of the vector, or the matrix.
        config: of the whole model.
        seed: of the run.
        expert: of a stack of experts; None elsewhere.
        drawn_on: where the numbers are drawn, and lie.

    Returns:
        fp32.

    Source: arXiv 2501.08313 section 4.2; 2203.00555.
    """
    if len(shape) == 1:
        return torch.ones(*shape, device=drawn_on)
    digest = blake2b(f"{seed} {name} {expert}".encode(), digest_size=8).digest()
    generator = torch.Generator(drawn_on).manual_seed(int.from_bytes(digest, "little") >> 1)
    noise = torch.empty(*shape, dtype=torch.float32, device=drawn_on).normal_(generator=generator)
    for rows, std in _parts(name, noise, config):
        rows.mul_(std)
    return noise


def _parts(name: str, matrix: Tensor, config: ModelConfig) -> list[tuple[Tensor, float]]:
    """The matrices that a parameter is made of, with their standard deviations."""
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if config.initialization == "normal" or kind in ("embed_tokens", "gate", "coefficient"):
        return [(matrix, config.initializer_range)]
    post_norm = config.norm_placement == "post_norm"
    gain = deepnorm_beta(config.num_hidden_layers) if post_norm else 1.0
    if kind == "qkv_proj":
        H, D = config.num_attention_heads, config.head_dim
        by_head = matrix.view(H, 3, D, -1)
        std = _xavier_std(H * D, matrix.shape[1])
        return [(by_head[:, :2], std), (by_head[:, 2], gain * std)]
    fan_out, fan_in = matrix.shape
    fan_out = fan_out // 2 if kind == "gate_up_proj" else fan_out
    return [(matrix, (gain if kind in _GAINED else 1.0) * _xavier_std(fan_out, fan_in))]


def _xavier_std(fan_out: int, fan_in: int) -> float:
    return (2 / (fan_in + fan_out)) ** 0.5
