"""Cross-entropy of a head whose vocabulary lies on several ranks, by chunks of tokens.

    loss = sum_t log(sum over ranks of sum_j exp(z_tj)) - z_t[y_t]

Two collectives for all tokens of a chunk, of one and two numbers a token: logits never travel. As
in sevenfold.ops.linear_cross_entropy the gradient is taken while a chunk's logits exist.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sevenfold.ops import autocast, full_precision, head_logits, linear

# fp32 logits of a chunk on one rank.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}


def vocabulary_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, start: int, group: dist.ProcessGroup
) -> Tensor:
    """Sum the cross-entropy over all tokens that have a label.

    Args:
        hidden: [..., D], the same on all ranks.
        weight: [vocab_size / ranks, D], this rank's rows.
        labels: [...] int64, or -100.
        start: the token that this rank's first row stands for.
        group: the ranks.

    Returns:
        The sum, the same on all ranks; the gradient of hidden is this rank's part.
    """
    hidden, weight = autocast(hidden, weight)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _VocabularyCrossEntropy.apply(flat, weight, labels.reshape(-1), start, group)


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        start: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        step = max(1, _CHUNK_ELEMENTS[hidden.device.type] // len(weight))
        with full_precision(hidden.device):
            for at in range(0, len(hidden), step):
                rows = hidden[at : at + step]
                dlogits, more = _gradient(rows, weight, labels[at : at + step] - start, group)
                # A label below zero after the shift may be another rank's.
                counted = (labels[at : at + step] >= 0).to(dtype)
                loss += (more * counted).sum()
                if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                    dlogits = (dlogits * counted[:, None]).to(hidden.dtype)
                    dhidden[at : at + step] = linear(dlogits, weight.t())
                    dweight += head_logits(dlogits.t(), rows.t())
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        (dloss,) = grads
        return dhidden * dloss, (dweight * dloss).to(ctx.weight_dtype), None, None, None


def _gradient(
    hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Gradient of this rank's logits, and losses [t]; target counts from the rank's first row."""
    logits = head_logits(hidden, weight)
    highest = logits.amax(-1)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    mine = (target >= 0) & (target < len(weight))
    place = torch.where(mine, target, 0)[:, None]
    wanted = torch.where(mine, logits.gather(1, place).squeeze(1) - highest, 0)
    exponents = logits.sub_(highest[:, None]).exp_()
    sums = torch.stack([exponents.sum(-1), wanted])
    dist.all_reduce(sums, group=group)
    dlogits = exponents.div_(sums[0][:, None])
    dlogits.scatter_add_(1, place, -mine.to(dlogits.dtype)[:, None])
    return dlogits, sums[0].log() - sums[1]
