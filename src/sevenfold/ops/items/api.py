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
    words: Tensor, copied: Tensor, places: Tensor, *, cleared: int, impl: Impl | str | None = None
) -> None:
    """Copy one item of an allocation out of it, and clear others, in one launch.

        copied[i] = words[from + i], i < C      words[at_n + i] = 0, i < cleared

    A CUDA graph holds it: which items they are is read on the device. Items do not overlap.

    Args:
        words: [W] int64, contiguous; written where it is cleared.
        copied: [C] int64, contiguous, of another allocation; written.
        places: [1 + N] int64 on their device: from, and at_n of N items; 0 is an item that is not
            cleared.
        cleared: words of an item, 0 or more.
        impl: "eager", which waits for the device, or "triton"; None takes default_items_impl. A
            named one never falls back.

    Raises:
        ValueError: words, copied or places has not one dimension, or places no number.
        TypeError: one of them is not int64.
        UnsupportedError: triton is asked for on another device, or there is no implementation of
            that name.
    """
    tensors = {"words": words, "copied": copied, "places": places}
    if any(x.dim() != 1 for x in tensors.values()) or not len(places):
        raise ValueError(
            "words, copied and places must have shapes [W], [C] and [1 + N], got "
            f"{', '.join(str(list(x.shape)) for x in tensors.values())}"
        )
    for name, x in tensors.items():
        check_dtype(name, x, (torch.int64,))
    chosen = choose_impl("copy_and_clear", impl, default_items_impl(words), _KNOWN)
    if chosen is Impl.EAGER:
        return eager.copy_and_clear(words, copied, places, cleared)
    if words.device.type != "cuda":
        raise UnsupportedError(f"words must be on a GPU for impl triton, got {words.device}")
    from sevenfold.ops.items import triton_items

    return triton_items.copy_and_clear(words, copied, places, cleared)
