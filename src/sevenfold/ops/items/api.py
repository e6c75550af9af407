"""Copying and clearing items of one allocation: the public operator and its checks."""

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.checks import check_dtype, choose_impl
from sevenfold.ops.items import eager
from sevenfold.ops.types import Impl

_KNOWN = (Impl.EAGER, Impl.TRITON)


def default_items_impl(words: Tensor) -> Impl:
    """Return what copy_and_clear takes: Triton on a GPU, else eager."""
    return Impl.TRITON if words.device.type == "cuda" else Impl.EAGER


def copy_and_clear(
    words: Tensor,
    places: Tensor,
    *,
    copied: int,
    cleared: int,
    impl: Impl | str | None = None,
) -> None:
    """Copy one item of an allocation to another, and clear some, in one launch.

        words[to + i] = words[from + i], i < copied      words[at_n + i] = 0, i < cleared

    A CUDA graph holds it: which items they are is read on the device. Items do not overlap.

    Args:
        words: [W] int64, contiguous; written.
        places: [2 + N] int64 on its device: from, to, and at_n of N items. Equal from and to copy
            nothing, and 0 is an item that is not cleared.
        copied, cleared: words of an item, 0 or more.
        impl: "eager", which waits for the device, or "triton"; None takes default_items_impl. A
            named one never falls back.

    Raises:
        ValueError: words or places has not one dimension, or places has fewer than two numbers.
        TypeError: one of them is not int64.
        UnsupportedError: triton is asked for on another device, or there is no implementation of
            that name.
    """
    if words.dim() != 1 or places.dim() != 1 or len(places) < 2:
        raise ValueError(
            "words and places must have shapes [W] and [2 + N], got "
            f"{list(words.shape)} and {list(places.shape)}"
        )
    for name, x in (("words", words), ("places", places)):
        check_dtype(name, x, (torch.int64,))
    chosen = choose_impl("copy_and_clear", impl, default_items_impl(words), _KNOWN)
    if chosen is Impl.EAGER:
        return eager.copy_and_clear(words, places, copied, cleared)
    if words.device.type != "cuda":
        raise UnsupportedError(f"words must be on a GPU for impl triton, got {words.device}")
    from sevenfold.ops.items import triton_items

    return triton_items.copy_and_clear(words, places, copied, cleared)
