"""Autograd of a loss whose gradients are made with it: the backward scales them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Wanted(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool


class Gradients(NamedTuple):
    """The summed loss in fp32 at least, and the gradients that are wanted."""

    loss: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


Run = Callable[[Tensor, Tensor, Tensor, Wanted], Gradients]


def loss_with_gradients(run: Run, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss that `run` makes of hidden [T, D], weight [V, D] and labels [T]."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _Loss.apply(run, hidden, weight, labels)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        made = run(hidden, weight, labels, Wanted(*ctx.needs_input_grad[1:3]))
        ctx.save_for_backward(made.dhidden, made.dweight)
        ctx.weight_dtype = weight.dtype
        return made.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        dhidden, dweight = ctx.saved_tensors
        (dloss,) = grads
        if dhidden is not None:
            dhidden = dhidden * dloss
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return None, dhidden, dweight, None
