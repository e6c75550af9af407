"""Token mixers: forward(x, batch, state) -> (y, state)."""

from torch import nn

from sevenfold.models.config import ModelConfig
from sevenfold.models.mixers.lightning import LightningAttention
from sevenfold.models.mixers.softmax import SoftmaxAttention

__all__ = ["LightningAttention", "SoftmaxAttention", "build_mixer"]


def build_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """Return the mixer that the layer's type names."""
    match config.layer_types[layer]:
        case "linear_attention":
            return LightningAttention(config, layer)
        case "full_attention":
            return SoftmaxAttention(config, window=None)
        case "sliding_attention":
            return SoftmaxAttention(config, window=config.sliding_window)
