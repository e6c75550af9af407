"""Softmax attention in cuDNN's kernel for Hopper, with its log-sum-exp, and its gradients.

By way of PyTorch's own operators, whose names begin with an underscore: the public one gives no
log-sum-exp. They build a plan for every shape that a thread has not met before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CAPABILITY = (9, 0)
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_WIDTH, _WIDTH_MULTIPLE = 128, 8


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


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend q [T, H, D] to k, v [S, G, D]: o [T, H, D] and lse [H, T] in fp32.

    Of all keys, or of those up to a query's own place, where S is T.
    """
    o, lse = attend([x[None].transpose(1, 2) for x in (q, k, v)], scale=scale, causal=causal)
    return o[0].transpose(0, 1), lse[0]


def attend(tokens: Sequence[Tensor], *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend q [N, H, T, D] to k, v [N, G, S, D]: o [N, H, T, D] and lse [N, H, T] in fp32."""
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *tokens, None, True, 0.0, causal, False, scale=scale
    )
    return o, lse.view(o.shape[:3])


def gradients(
    do: Tensor,
    tokens: Sequence[Tensor],
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of `attend`; o and lse may be of more keys than these."""
    q, k, _ = tokens
    no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do,
        *tokens,
        o,
        lse[..., None].contiguous(),
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )
