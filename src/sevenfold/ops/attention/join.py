"""Joins two parts of softmax attention, over different keys, by their log-sum-exps.

    o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b        lse = log(exp(lse_a) + exp(lse_b))

Source: arXiv 2205.14135 (FlashAttention), 2307.08691 (FlashAttention-2).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """o [T, H, D] over some keys, and lse [H, T], finite, in fp32 or more."""

    o: Tensor
    lse: Tensor


def join_eager(some: Part, more: Part, out: Tensor) -> Part:
    """Write both parts' o into out, of any dtype, which may be some.o; sums have lse's dtype."""
    lse = torch.logaddexp(some.lse, more.lse)
    weigh, add = (torch.exp(part.lse - lse).t()[..., None] for part in (some, more))
    out.copy_(some.o * weigh + more.o * add)
    return Part(out, lse)
