"""A whole mixture of SwiGLU experts as one operator: rows out, two grouped products, rows back.

The forward keeps its arguments and the first product's result. The backward lays the rows out again
and takes the hidden rows again, in the pass that takes their gradient anyway: per choice that saves
D + F values between forward and backward for one more pass over D.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.experts.triton_glu import weighted_swiglu, weighted_swiglu_backward
from sevenfold.ops.experts.triton_rows import spread, total
from sevenfold.ops.operator import operator


class _Plan(NamedTuple):
    """A Dispatch and the end of each expert's rows, int32."""

    choice: Tensor
    row: Tensor
    ends: Tensor

    @classmethod
    def of(cls, choice: Tensor, row: Tensor, rows_per_expert: Tensor) -> "_Plan":
        return cls(choice, row, torch.cumsum(rows_per_expert, 0, dtype=torch.int32))

    def lay_out(self, x: Tensor) -> Tensor:
        rows = torch.empty(len(self.choice), x.shape[1], dtype=x.dtype, device=x.device)
        spread(x, self.row, rows)
        return rows


@operator("sevenfold::mixture")
def mixture(
    x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    choice: Tensor, row: Tensor, rows_per_expert: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weighted sum of the experts [T, D], and the first product [R, 2 F]."""
    plan = _Plan.of(choice, row, rows_per_expert)
    gate_up = F.grouped_mm(plan.lay_out(x), gate_up_proj.mT, offs=plan.ends)
    hidden = weighted_swiglu(gate_up, weights.contiguous(), choice, plan.ends[-1:])
    out = F.grouped_mm(hidden, down_proj.mT, offs=plan.ends)
    return total(out, None, row), gate_up


@operator("sevenfold::mixture_backward")
def mixture_backward(
    dy: Tensor, gate_up: Tensor, x: Tensor, weights: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, choice: Tensor, row: Tensor, rows_per_expert: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weights, gate_up_proj and down_proj."""
    plan = _Plan.of(choice, row, rows_per_expert)
    dout = plan.lay_out(dy)
    dhidden = F.grouped_mm(dout, down_proj, offs=plan.ends)
    dgate_up, dweights, hidden = weighted_swiglu_backward(
        dhidden, gate_up, weights.contiguous(), choice, plan.ends[-1:]
    )
    ddown = F.grouped_mm(dout.T, hidden, offs=plan.ends)
    del dout, dhidden, hidden
    dx = total(F.grouped_mm(dgate_up, gate_up_proj, offs=plan.ends), None, row)
    dgate_up_proj = F.grouped_mm(dgate_up.T, plan.lay_out(x), offs=plan.ends)
    return dx, dweights, dgate_up_proj, ddown


@mixture.register_fake
def _(x, weights, gate_up_proj, down_proj, choice, row, rows_per_expert):
    return x.new_empty(x.shape), x.new_empty(choice.shape[0], gate_up_proj.shape[1])


@mixture_backward.register_fake
def _(dy, gate_up, x, weights, gate_up_proj, down_proj, choice, row, rows_per_expert):
    return tuple(t.new_empty(t.shape) for t in (x, weights, gate_up_proj, down_proj))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _grads(ctx: Any, dy: Tensor | None, dgate_up: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    return *mixture_backward(dy, *ctx.saved_tensors), None, None, None


mixture.register_autograd(_grads, setup_context=_save)
