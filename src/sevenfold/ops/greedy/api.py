"""The greedy choice of a token: the public operator, its checks and the implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.checks import check_dtype, check_shape, choose_impl
from sevenfold.ops.greedy import eager
from sevenfold.ops.greedy.eager import are_finite
from sevenfold.ops.triton_rules import check_on_gpu
from sevenfold.ops.types import Impl

__all__ = ["Greedy", "advance_rows", "are_finite", "default_greedy_impl", "greedy_tokens"]

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


def advance_rows(
    logits: Tensor,
    chosen: Tensor,
    places: Tensor,
    pages: Tensor,
    *,
    page_tokens: int,
    impl: Impl | str | None = None,
) -> None:
    """Choose each row's next token as greedy_tokens does, and say where it will stand, in place.

        chosen_n = (token, finite)      t' = t + 1      keys' = keys + 1
        page' = pages[n, min(t' // page_tokens, M - 1)]      place' = t' % page_tokens

    What a decoding step has read of its rows becomes what the next one reads, so that a graph of it
    can be replayed again without the host. A row without keys only fills the step: it stays where
    it is.

    Args:
        logits: [N, V], after the rows' tokens; fp32 for triton.
        chosen: [N, 2] int64, contiguous; written: token id, and 1 where the logits are numbers
            alone.
        places: [4, N] int64, contiguous; of the token that has run: position t, page, place in it,
            and keys, its own included. Overwritten by those of the next.
        pages: [N, M] int64, contiguous; the pages of each row in the order of its tokens.
        page_tokens: of a page, at least 1.
        impl: as in greedy_tokens.

    Raises:
        ValueError, TypeError, UnsupportedError: as greedy_tokens; or a shape breaks the rules.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [N, V] with V > 0, got {list(logits.shape)}")
    N = len(logits)
    check_shape("chosen", chosen, (N, 2), "[N, 2]")
    check_shape("places", places, (4, N), "[4, N]")
    check_shape("pages", pages, (N, pages.shape[-1]), "[N, M]")
    for name, x in (("chosen", chosen), ("places", places), ("pages", pages)):
        check_dtype(name, x, (torch.int64,))
    chosen_impl = choose_impl("advance_rows", impl, default_greedy_impl(logits), _KNOWN)
    if chosen_impl is Impl.EAGER:
        return eager.advance_rows(logits, chosen, places, pages, page_tokens)
    check_dtype("logits", logits, (torch.float32,))
    check_on_gpu("logits", logits)
    from sevenfold.ops.greedy import triton_greedy

    return triton_greedy.advance_rows(logits, chosen, places, pages, page_tokens)
