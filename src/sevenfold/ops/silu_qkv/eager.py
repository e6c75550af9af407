"""SiLU of the projection by PyTorch: q, k and v are views of one tensor."""

from torch import Tensor
from torch.nn import functional as F


def forward(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; arguments and results as in the public operator."""
    heads = F.silu(qkv).unflatten(-1, (num_heads, -1))
    q, k, v = heads.chunk(3, dim=-1)
    return q, k, v
