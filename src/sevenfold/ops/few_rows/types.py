"""What half a layer of a few rows is made of."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and eps."""

    weight: Tensor
    eps: float


class Residual(NamedTuple):
    """y = alpha * stream + beta * f; the stream is the norm's output (post-norm) or its input."""

    alpha: float
    beta: float
    post_norm: bool


class LightningWeights(NamedTuple):
    """Of a lightning-attention layer.

    qkv [3 H D, hidden_size], head by head; gate [H D, hidden_size]; norm over H D;
    out [hidden_size, H D]; log_decay [H].
    """

    qkv: Tensor
    gate: Tensor
    norm: Norm
    out: Tensor
    log_decay: Tensor
