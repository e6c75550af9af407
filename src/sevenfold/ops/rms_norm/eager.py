"""RMSNorm with its statistic in fp32, and a backward that saves its input only."""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm; arguments and result as in the public operator."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, weight, eps)


def _root(x: Tensor, eps: float) -> Tensor | float:
    """r of x [..., D] in fp32 at least: [..., 1], or a number for one row on a CPU (decoding)."""
    if x.numel() == x.shape[-1] and x.device.type == "cpu":
        row = x.flatten()
        return (float(row.dot(row)) / len(row) + eps) ** -0.5
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * _root(wide, eps)).mul_(weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = _root(wide, ctx.eps)
        normed = wide * r
        dy = dy.to(wide.dtype)
        dweight = (dy * normed).sum_to_size(weight.shape)
        scaled = dy * weight  # the gradient of normed
        shared = torch.linalg.vecdot(scaled, normed).unsqueeze(-1).div_(x.shape[-1])
        dx = torch.addcmul(scaled, normed, shared, value=-1).mul_(r)
        return dx.to(x.dtype), dweight.to(weight.dtype), None
