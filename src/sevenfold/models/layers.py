"""Small layers that every block shares: Linear, RMSNorm, rotary position embedding."""

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


def rotate(x: Tensor, positions: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Turn the first rotary_dim channels by the position, half against half.

        angle_i = position * theta^(-2 i / rotary_dim)
        y_i = x_i cos - x_{i + r/2} sin,  y_{i + r/2} = x_{i + r/2} cos + x_i sin,  i < r/2

    Args:
        x: [B, T, H, D].
        positions: [B, T] int64.
        rotary_dim: r, even, at most D; the other channels pass through.
        theta: base of the angles.

    Returns:
        [B, T, H, D] in x's dtype; angles, cos and sin are fp32 (fp64 for fp64 x).

    Source: RoPE, arXiv 2104.09864, in the half-split layout of the published checkpoints.
    """
    if rotary_dim == 0:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    channel = torch.arange(0, rotary_dim, 2, device=x.device, dtype=dtype)
    angle = positions[..., None].to(dtype) * theta ** (-channel / rotary_dim)  # [B, T, r / 2]
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    first, second, rest = x.to(dtype).split(
        [rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1
    )
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)
