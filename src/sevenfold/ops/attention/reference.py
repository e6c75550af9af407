"""Softmax attention as its formula reads, one query at a time over its visible keys."""

import torch
from torch import Tensor


def one_sequence(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """One sequence; q [Tq, H, D] are its last tokens, k and v [Tk, G, D or V] all of them."""
    Tq, H, _ = q.shape
    Tk, G, _ = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v_ = (x.to(dtype).repeat_interleave(H // G, dim=1) for x in (k, v))
    outputs = []
    for i in range(Tq):
        last = Tk - Tq + i + 1
        first = 0 if window is None else max(0, last - window)
        scores = scale * torch.einsum("hd,thd->ht", q[i].to(dtype), k[first:last])
        outputs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v_[first:last]))
    return torch.stack(outputs).to(v.dtype)
