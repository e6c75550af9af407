"""The greedy choice of a token: the public operator, its checks and the implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, choose_impl
from sevenfold.ops.greedy import eager
from sevenfold.ops.greedy.eager import are_finite
from sevenfold.ops.triton_rules import check_on_gpu
from sevenfold.ops.types import Impl

__all__ = ["Greedy", "are_finite", "default_greedy_impl", "greedy_tokens"]

_KNOWN = (Impl.EAGER, Impl.TRITON)


class Greedy(NamedTuple):
    """Of each row: tokens [N] int64, and finite [N] bool, whether it holds numbers alone."""

    tokens: Tensor
    finite: Tensor


def default_greedy_impl(logits: Tensor) -> Impl:
    """Return what greedy_tokens takes: Triton for fp32 on a GPU, else eager."""
    fits = logits.device.type == "cuda" and logits.dtype is torch.float32
    return Impl.TRITON if fits else Impl.EAGER


def greedy_tokens(logits: Tensor, *, impl: Impl | str | None = None) -> Greedy:
    """Choose the largest logit of each row, and check the row, in one pass.

        token = the least i with z_i = max_j z_j        finite: |z_j| < inf for all j

    Args:
        logits: [N, V], V at least 1; fp32 for triton. A NaN counts as the largest.
        impl: "eager" or "triton"; None takes default_greedy_impl. A named one never falls back.

    Raises:
        ValueError: logits has not two dimensions, or no columns.
        TypeError: triton is asked for on another dtype.
        UnsupportedError: triton is asked for on another device, or there is no implementation of
            that name.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [N, V] with V > 0, got {list(logits.shape)}")
    chosen = choose_impl("greedy_tokens", impl, default_greedy_impl(logits), _KNOWN)
    if chosen is Impl.EAGER:
        return Greedy(*eager.greedy_tokens(logits))
    check_dtype("logits", logits, (torch.float32,))
    check_on_gpu("logits", logits)
    from sevenfold.ops.greedy import triton_greedy

    return Greedy(*triton_greedy.greedy_tokens(logits))
