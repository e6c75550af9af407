"""Sequences of equal length in cuDNN's kernel for Hopper, with their log-sum-exps.

By way of PyTorch's own operator, whose name begins with an underscore: the public one gives no
log-sum-exp. It builds a plan for every shape that a thread has not met before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CAPABILITY = (9, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_WIDTH, _WIDTH_MULTIPLE = 128, 8
# Lengths that no training run asks for by chance: another would cost a plan.
_UNIT_TOKENS = 1024


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why it cannot compute this, if it cannot."""
    if q.device.type != "cuda" or q.dtype not in _DTYPES:
        return f"q must be bf16 or fp16 on a GPU for impl cudnn, got {q.dtype} on {q.device}"
    width = q.shape[-1]
    if width != v.shape[-1] or width % _WIDTH_MULTIPLE or width > _MAX_WIDTH:
        return (
            f"D and V must be one multiple of {_WIDTH_MULTIPLE} up to {_MAX_WIDTH} for impl cudnn, "
            f"got {width} and {v.shape[-1]}"
        )
    capability = torch.cuda.get_device_capability(q.device)
    if capability != CAPABILITY:
        return (
            f"q must lie on a GPU of compute capability 9.0 for impl cudnn, got "
            f"{capability[0]}.{capability[1]}"
        )
    return None


def whole_refusal(q: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> str | None:
    """Why it cannot compute whole sequences, if it cannot."""
    if window is not None:
        return f"window must be None for impl cudnn, got {window}"
    if len(set(lengths)) != 1 or not lengths[0]:
        return f"lengths must be alike and not 0 for impl cudnn, got {list(lengths)}"
    return refusal(q, v)


def suits_whole(q: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> bool:
    """Whether it is the default for whole sequences: lengths that come again and again.

    Its backward adds up in no fixed order.
    """
    if whole_refusal(q, v, lengths, window) or lengths[0] % _UNIT_TOKENS:
        return False
    return not torch.are_deterministic_algorithms_enabled()


def whole(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Causal attention in sequences of q [N, T, H, D] over k, v [N, T, G, D]: [N, T, H, D]."""
    return _run(q, k, v, scale, causal=True)[0]


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend q [T, H, D] to k, v [S, G, D]: o [T, H, D] and lse [H, T] in fp32.

    Of all keys, or of those up to a query's own place, where S is T.
    """
    o, lse = _run(q[None], k[None], v[None], scale, causal)
    return o[0], lse.view(q.shape[1], len(q))


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, causal, False, scale=scale
    )
    return o.transpose(1, 2), lse
