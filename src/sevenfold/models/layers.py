"""Small layers that every block shares: Linear, RMSNorm, rotary position embedding."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sevenfold.ops import linear, rms_norm


class Linear(nn.Linear):
    """y = x W^T without bias, through sevenfold.ops.linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight; x [..., in_features]."""
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in fp32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]; the result has x's dtype."""
        return rms_norm(x, self.weight, self.eps)


class Rotation(NamedTuple):
    """cos and sin [B, T, 1, r / 2] of the angles that positions turn channels by."""

    cos: Tensor
    sin: Tensor


def rotation(
    positions: Tensor, rotary_dim: int, theta: float, *, dtype: torch.dtype
) -> Rotation | None:
    """Return the angles of a batch's positions.

        angle_i = position * theta^(-2 i / rotary_dim),  i < rotary_dim / 2

    Args:
        positions: [B, T] int64.
        rotary_dim: r, even; 0 turns nothing.
        theta: base of the angles.
        dtype: of what is turned; angles, cos and sin are fp32 (fp64 for fp64).

    Returns:
        Their cos and sin; None for rotary_dim 0.
    """
    if rotary_dim == 0:
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    turn = frequency(rotary_dim, theta, device=positions.device, dtype=dtype)
    angle = positions[..., None].to(dtype) * turn  # [B, T, r / 2]
    return Rotation(angle.cos()[:, :, None], angle.sin()[:, :, None])


def frequency(rotary_dim: int, theta: float, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The angles [r / 2] of one position's step: theta^(-2 i / rotary_dim); rotary_dim r > 0."""
    channel = torch.arange(0, rotary_dim, 2, device=device, dtype=dtype)
    return theta ** (-channel / rotary_dim)


def rotate(x: Tensor, turns: Rotation | None) -> Tensor:
    """Turn the first r channels, half against half; the others pass through.

        y_i = x_i cos - x_{i + r/2} sin,  y_{i + r/2} = x_{i + r/2} cos + x_i sin,  i < r/2

    Args:
        x: [B, T, H, D].
        turns: of its positions; None turns nothing.

    Returns:
        [B, T, H, D] in x's dtype.

    Source: RoPE, arXiv 2104.09864, in the half-split layout of the published checkpoints.
    """
    if turns is None:
        return x
    cos, sin = turns
    half = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)
