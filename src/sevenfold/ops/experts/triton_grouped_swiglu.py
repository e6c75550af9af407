"""SwiGLU experts on sorted rows as one operator: it takes the hidden rows again in the backward."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.experts.triton_glu import hidden_rows, hidden_rows_backward
from sevenfold.ops.operator import operator


@operator("sevenfold::grouped_swiglu")
def grouped_swiglu(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """The experts' rows [R, D], and the first product [R, 2 F]; ends of each expert's rows."""
    gate_up = F.grouped_mm(x, gate_up_proj.mT, offs=ends)
    return F.grouped_mm(hidden_rows(gate_up), down_proj.mT, offs=ends), gate_up


@operator("sevenfold::grouped_swiglu_backward")
def grouped_swiglu_backward(
    dy: Tensor, gate_up: Tensor, x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate_up_proj and down_proj."""
    dy = dy.contiguous()
    dgate_up, hidden = hidden_rows_backward(F.grouped_mm(dy, down_proj, offs=ends), gate_up)
    ddown = F.grouped_mm(dy.T, hidden, offs=ends)
    del hidden
    dx = F.grouped_mm(dgate_up, gate_up_proj, offs=ends)
    return dx, F.grouped_mm(dgate_up.T, x, offs=ends), ddown


@grouped_swiglu.register_fake
def _(x, gate_up_proj, down_proj, ends):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], gate_up_proj.shape[1])


@grouped_swiglu_backward.register_fake
def _(dy, gate_up, x, gate_up_proj, down_proj, ends):
    return tuple(t.new_empty(t.shape) for t in (x, gate_up_proj, down_proj))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _grads(ctx: Any, dy: Tensor | None, dgate_up: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    return *grouped_swiglu_backward(dy, *ctx.saved_tensors), None


grouped_swiglu.register_autograd(_grads, setup_context=_save)
