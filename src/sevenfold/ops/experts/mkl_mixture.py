"""A mixture of experts in fp32 on a CPU with its gradients: products by MKL, expert by expert.

For processors on which MKL is faster than register tiles (linear/mkl.py).
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sevenfold.ops.compiled import empty, use_torch_threads
from sevenfold.ops.experts import compiled
from sevenfold.ops.experts.token_gradients import token_gradients


def _parts(rows_per_expert: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    counts = rows_per_expert.tolist()
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            yield expert, slice(end - count, end)


class MklMixture(torch.autograd.Function):
    """Of contiguous fp32 arguments; saves them and the first product, all else is computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        choice: Tensor,
        row: Tensor,
        rows_per_expert: Tensor,
    ) -> Tensor:
        """Arguments and result as the public operator's."""
        token, (_, F2, D) = choice // row.shape[1], gate_up_proj.shape
        kept, rows, y = empty(len(choice), F2), empty(len(choice), D), empty(*x.shape)
        use_torch_threads()
        for e, part in _parts(rows_per_expert):
            gate_up = torch.mm(x[token[part]], gate_up_proj[e].t(), out=kept[part])
            hidden = empty(len(gate_up), F2 // 2)
            compiled.swiglu_rows(gate_up.numpy(), hidden.numpy())
            torch.mm(hidden, down_proj[e].t(), out=rows[part])
        compiled.combine(*(t.detach().numpy() for t in (rows, row, weights, y)))
        saved = (x, weights, gate_up_proj, down_proj, choice, row, rows_per_expert, kept)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the four first arguments."""
        x, weights, gate_up_proj, down_proj, choice, row, rows_per_expert, kept = ctx.saved_tensors
        dy, share, token = grads[0].contiguous(), weights.flatten()[choice], choice // row.shape[1]
        drows, dshare = empty(len(choice), x.shape[1]), torch.empty_like(share)
        dgate_up_proj, ddown_proj = (torch.zeros_like(w) for w in (gate_up_proj, down_proj))
        use_torch_threads()
        for e, part in _parts(rows_per_expert):
            dout = dy[token[part]]
            dhidden = torch.mm(dout, down_proj[e])
            hidden, dgate_up = torch.empty_like(dhidden), torch.empty_like(kept[part])
            arrays = (kept[part], share[part], dhidden, hidden, dgate_up, dshare[part])
            compiled.swiglu_rows_backward(*(t.numpy() for t in arrays))
            torch.mm(dgate_up, gate_up_proj[e], out=drows[part])
            torch.mm(dgate_up.t(), x[token[part]], out=dgate_up_proj[e])
            torch.mm(dout.t(), hidden, out=ddown_proj[e])
        dx, dweights = token_gradients(drows, dshare, choice, row)
        return dx, dweights, dgate_up_proj, ddown_proj, None, None, None
