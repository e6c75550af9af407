"""The fixed decay of each head and layer."""

import math

import torch
from torch import Tensor


def head_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head: how fast it forgets, before the layer factor.

        slope_h = 2^(-8 h / H), h = 1 ... H, for H a power of two

    For other H: the slopes of the next lower power of two P, then every second slope (the first,
    third, ...) of 2P, as many as are missing.

    Args:
        num_heads: H, at least 1.

    Returns:
        H slopes, natural-log units per token.

    Raises:
        ValueError: num_heads is less than 1.

    Source: the ALiBi rule, as MiniMax-Text-01 applies it.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)]
    return slopes + finer[::2][: num_heads - power]


def layer_log_decay(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Return the log decay of each head in one layer.

        log_decay_h = -slope_h * (1 - l / (L - 1) + 1e-5)

    Args:
        num_heads: H.
        layer: l, index of the layer among all layers of the model, softmax layers included.
        num_layers: L, all layers of the model; a model of one layer has factor 1 + 1e-5.

    Returns:
        [H] fp32 on the CPU, all < 0.

    Raises:
        ValueError: layer lies outside 0 to num_layers - 1.

    Source: MiniMax-Text-01 modeling file; arXiv 2501.08313 section 2.2.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must lie in 0 to {num_layers - 1}, got {layer}")
    factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
    log_decay = [-slope * factor for slope in head_slopes(num_heads)]
    # On the CPU even where a model is being built on the meta device: these are values.
    return torch.tensor(log_decay, dtype=torch.float32, device="cpu")
