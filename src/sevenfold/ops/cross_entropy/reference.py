"""Cross-entropy as its formula reads, over all logits at once."""

import torch
from torch import Tensor


def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over counted tokens; arguments as in the public operator, flattened."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counted = labels >= 0
    logits = hidden[counted].to(dtype) @ weight.to(dtype).T
    chosen = logits.gather(1, labels[counted, None]).squeeze(1)
    return (torch.logsumexp(logits, dim=-1) - chosen).sum()
