"""New tokens' keys and values into their pages: the public operator."""

import torch
from torch import Tensor

from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.TRITON)
_INDICES = (torch.int32, torch.int64)


def write_pages(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page: Tensor,
    place: Tensor,
    *,
    impl: Impl | str | None = None,
) -> None:
    """Put keys and values of new tokens where their sequences' pages have room for them.

        k_pages[page_i, place_i] = k_i        v_pages[page_i, place_i] = v_i

    Args:
        k: [tokens, G, D], any floating dtype.
        v: [tokens, G, V], dtype of k.
        k_pages: [P, page_tokens, G, D], dtype of k, contiguous within a page; pages may lie apart.
            Changed in place.
        v_pages: [P, page_tokens, G, V], as k_pages.
        page: [tokens] int32 or int64, less than P, not checked. Tokens that only fill a batch may
            share a place that nobody reads.
        place: [tokens] int32 or int64, less than page_tokens, not checked.
        impl: "eager" or "triton"; None takes triton on a CUDA device, else eager. A named one never
            falls back.

    Raises:
        ValueError, TypeError: a shape, dtype, device or layout breaks the rules above.
        UnsupportedError: the implementation cannot serve the arguments.
    """
    if k.dim() != 3:
        raise ValueError(f"k must have shape [tokens, G, D], got {list(k.shape)}")
    check_shape("v", v, (*k.shape[:2], v.shape[-1]), "[tokens, G, V]")
    check_dtype("v", v, (k.dtype,))
    for name, pool, x in (("k_pages", k_pages, k), ("v_pages", v_pages, v)):
        check_shape(name, pool, (*pool.shape[:2], *x.shape[1:]), "[P, page_tokens, G, width]")
        check_dtype(name, pool, (k.dtype,))
        check_device(name, pool, k.device)
        if not pool[0].is_contiguous():
            raise ValueError(
                f"{name} must be contiguous within a page, got strides {list(pool.stride())}"
            )
    for name, x in (("page", page), ("place", place)):
        check_shape(name, x, (len(k),), "[tokens]")
        check_dtype(name, x, _INDICES)
        check_device(name, x, k.device)
    default = Impl.TRITON if k.device.type == "cuda" else Impl.EAGER
    chosen = choose_impl("write_pages", impl, default, _IMPLS)
    _write(k, v, k_pages, v_pages, page, place, str(chosen))


@torch.library.custom_op("sevenfold::write_pages", mutates_args=("k_pages", "v_pages"))
def _write(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page: Tensor,
    place: Tensor,
    impl: str,
) -> None:
    if impl == Impl.TRITON:
        from sevenfold.ops.attention import triton_pages_write

        return triton_pages_write.write(k, v, k_pages, v_pages, page, place)
    k_pages[page, place], v_pages[page, place] = k, v
    return None


@_write.register_fake
def _fake(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page: Tensor,
    place: Tensor,
    impl: str,
) -> None:
    return None
