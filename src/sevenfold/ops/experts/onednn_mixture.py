"""A whole mixture of experts in fp32 on a CPU, expert by expert, through oneDNN's products.

Measured on 2 threads of an AMD EPYC, a training step of the 19M model: over all rows at once a
fifth of it went into page faults of buffers above 32 MB, which glibc returns to the system each
time. An expert's rows are filled up to a multiple of 32, because oneDNN takes up to a millisecond
to prepare a product of a shape that it has not met.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.compiled import use_torch_threads
from sevenfold.ops.experts import compiled
from sevenfold.ops.linear.onednn import matmul_nt, weight_grad

_MULTIPLE = 32


class _Group(NamedTuple):
    """One expert that has rows: each one's token and share, and how many rows its products take."""

    expert: int
    chosen: Tensor
    token: Tensor
    share: Tensor
    padded: int


def mixture(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    choice: Tensor,
    rows_per_expert: Tensor,
) -> Tensor:
    """The mixture; arguments and result as in the public operator."""
    inputs = (x, weights, gate_up_proj, down_proj)
    use_torch_threads()
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _Mixture.apply(*inputs, choice, rows_per_expert)
    return _forward(*inputs, _groups(weights, choice, rows_per_expert), None)


def _groups(weights: Tensor, choice: Tensor, rows_per_expert: Tensor) -> Iterator[_Group]:
    counts, flat = rows_per_expert.tolist(), weights.flatten()
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if count:
            chosen = choice[end - count : end]
            padded = -(-count // _MULTIPLE) * _MULTIPLE
            yield _Group(expert, chosen, chosen // weights.shape[1], flat[chosen], padded)


def _gathered(x: Tensor, group: _Group) -> Tensor:
    """The rows of x that a group takes, filled up with zeros."""
    rows = x.new_empty(group.padded, x.shape[1])
    compiled.gather(x.numpy(), group.token.numpy(), rows.numpy())
    return rows


def _forward(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    groups: Iterator[_Group],
    kept: list[Tensor] | None,
) -> Tensor:
    """The mixture; `kept` receives each expert's first product."""
    x = x.detach().contiguous()
    y = torch.zeros_like(x)
    for group in groups:
        gate_up = matmul_nt(_gathered(x, group), gate_up_proj[group.expert])
        hidden = gate_up.new_empty(group.padded, gate_up.shape[1] // 2)
        compiled.glu(gate_up.numpy(), hidden.numpy())
        fed = matmul_nt(hidden, down_proj[group.expert])
        token, share = group.token.numpy(), group.share.detach().numpy()
        compiled.scatter(fed.numpy(), token, share, y.numpy())
        if kept is not None:
            kept.append(gate_up)
    return y


class _Mixture(torch.autograd.Function):
    """Saves x and each expert's first product; all else is computed anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        choice: Tensor,
        rows_per_expert: Tensor,
    ) -> Tensor:
        groups, gate_ups = _groups(weights, choice, rows_per_expert), []
        y = _forward(x, weights, gate_up_proj, down_proj, groups, gate_ups)
        inputs = (x, weights, gate_up_proj, down_proj, choice, rows_per_expert)
        ctx.save_for_backward(*inputs, *gate_ups)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, weights, gate_up_proj, down_proj, choice, rows_per_expert, *gate_ups = saved
        use_torch_threads()
        x, dy = x.contiguous(), grads[0].contiguous()
        dx, dweights = torch.zeros_like(x), torch.zeros_like(weights)
        dgate_up_proj, ddown_proj = torch.zeros_like(gate_up_proj), torch.zeros_like(down_proj)
        groups = _groups(weights, choice, rows_per_expert)
        for group, gate_up in zip(groups, gate_ups, strict=True):
            e, drows = group.expert, _gathered(dy, group)
            dhidden = matmul_nt(drows, down_proj[e].t())
            # share * hidden, and d/dshare of share * W_down h . dy = h . W_down^T dy
            hidden, dgate_up = torch.empty_like(dhidden), torch.empty_like(gate_up)
            dshare = torch.empty_like(group.share)
            inputs = (gate_up, dhidden, group.share, hidden, dgate_up, dshare)
            compiled.glu_backward(*(t.numpy() for t in inputs))
            dweights.view(-1)[group.chosen] = dshare
            ddown_proj[e] = weight_grad(drows, hidden)
            dgate_up_proj[e] = weight_grad(dgate_up, _gathered(x, group))
            drows = matmul_nt(dgate_up, gate_up_proj[e].t())
            ones = torch.ones_like(group.share)
            compiled.scatter(drows.numpy(), group.token.numpy(), ones.numpy(), dx.numpy())
        return dx, dweights, dgate_up_proj, ddown_proj, None, None
