"""Softmax attention over keys in pages where every length lies on the device; the operator."""

import torch
from torch import Tensor

from sevenfold.ops.attention import pages_eager, pages_reference
from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.operator import operator
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

MAX_TREE_TOKENS = 16
_IMPLS = (Impl.REFERENCE, Impl.EAGER, Impl.TRITON)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)
_WIDEST = 256


def default_pages_impl(q: Tensor, V: int) -> Impl:
    """Return what serves q by default.

    Triton on a CUDA device in bf16, fp16 or fp32 with heads of at most 256, else eager.
    """
    on_gpu = q.device.type == "cuda" and q.dtype in _DTYPES
    return Impl.TRITON if on_gpu and max(q.shape[-1], V) <= _WIDEST else Impl.EAGER


def attention_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    key_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    ancestors: Tensor | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """Softmax attention of new tokens over pages that already hold their keys.

        o_t = sum_j softmax_j(scale * q_t^T k_j) v_j    over the keys j that t sees
        key j of sequence n = k_pages[pages[n, j // page_tokens], j % page_tokens]

    The last keys of a sequence are its new tokens'. A new token sees every key before them, itself,
    and those of its ancestors among them: all before it, unless `ancestors` says which. Keys that
    are `window` or more places behind it are not seen; a place counts ancestors.
    Among a sequence's own keys and values a NaN reaches tokens that do not see it, too.

    Unlike attention_paged it reads no length on the host (impl "triton"), so that a CUDA graph can
    hold it, and a sequence's result is the same bit for bit whatever else is in the batch; of a
    packed row, whatever else is in it on the same side of 512 tokens in all. It takes no gradient.

    Args:
        q: [N, T, H, D], T new tokens of each of N sequences; or, with cu_seqlens, [1, T, H, D].
        k_pages: [P, page_tokens, G, D], dtype of q; pages may lie apart. G divides H: query head h
            reads key head h * G // H.
        v_pages: [P, page_tokens, G, V], dtype of q.
        pages: [N, M] int32 or int64, the pages of each sequence in the order of its tokens; those
            behind its last token are not read.
        key_lengths: [N] int32 or int64, keys of each sequence, its new tokens' included, at most
            M * page_tokens, not checked; 0 where a sequence only fills the batch: its output is
            zero.
        scale: multiplies the scores.
        window: places that a token sees, its own included, at least 1; None is all before it.
        cu_seqlens: [N + 1] int32 or int64 on q's device, cumulative numbers of new tokens, 0 first,
            T last or less, not checked; rows behind the last come out as anything.
        ancestors: [N, T, T] bool, ancestors[n, t, s] says that s is t or an ancestor of t, which
            stands before it; T <= 16. None is a chain.
        impl: "reference", "eager" or "triton"; None takes default_pages_impl. A named one never
            falls back.

    Returns:
        [N, T, H, V], or [1, T, H, V], in v's dtype.

    Raises:
        ValueError: a shape, device or value breaks the rules above; the message names both.
        TypeError: a dtype breaks them.
        UnsupportedError: the implementation cannot serve the arguments.
    """
    _check_tensors(q, k_pages, v_pages)
    _check_lengths(q, pages, key_lengths, cu_seqlens)
    _check_tree(q, cu_seqlens, ancestors)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    default = default_pages_impl(q, v_pages.shape[-1])
    chosen = choose_impl("attention_pages", impl, default, _IMPLS)
    where = (pages, key_lengths, cu_seqlens, ancestors)
    return _attend(q, k_pages, v_pages, *where, float(scale), window, str(chosen))


def _check_tensors(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must have 4 dimensions, got {q.dim()}")
    if k_pages.dim() != 4:
        raise ValueError(f"k_pages must have 4 dimensions, got {k_pages.dim()}")
    G, width = k_pages.shape[2], v_pages.shape[-1]
    check_shape("k_pages", k_pages, (*k_pages.shape[:3], q.shape[3]), "[P, page_tokens, G, D]")
    check_shape("v_pages", v_pages, (*k_pages.shape[:3], width), "[P, page_tokens, G, V]")
    if G < 1 or q.shape[2] % G:
        raise ValueError(f"k_pages' heads must divide the {q.shape[2]} query heads, got {G}")
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_dtype(name, x, (q.dtype,))
        check_device(name, x, q.device)


def _check_lengths(
    q: Tensor, pages: Tensor, key_lengths: Tensor, cu_seqlens: Tensor | None
) -> None:
    N = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    if cu_seqlens is not None and len(q) != 1:
        raise ValueError(f"cu_seqlens needs a packed batch: q must be [1, T, H, D], got {len(q)}")
    check_shape("pages", pages, (N, pages.shape[-1]), "[N, M]")
    check_shape("key_lengths", key_lengths, (N,), "[N]")
    named = {"pages": pages, "key_lengths": key_lengths}
    for name, x in (named if cu_seqlens is None else named | {"cu_seqlens": cu_seqlens}).items():
        check_dtype(name, x, _INDICES)
        check_device(name, x, q.device)


def _check_tree(q: Tensor, cu_seqlens: Tensor | None, ancestors: Tensor | None) -> None:
    if ancestors is None:
        return
    N, T = q.shape[:2]
    if cu_seqlens is not None:
        raise ValueError("ancestors must be of rows of equal length, got cu_seqlens beside them")
    if T > MAX_TREE_TOKENS:
        raise ValueError(f"T must be at most {MAX_TREE_TOKENS} with ancestors, got {T}")
    check_shape("ancestors", ancestors, (N, T, T), "[N, T, T]")
    check_dtype("ancestors", ancestors, (torch.bool,))
    check_device("ancestors", ancestors, q.device)


@operator("sevenfold::attention_pages")
def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    key_lengths: Tensor,
    cu_seqlens: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
    window: int | None,
    impl: str,
) -> Tensor:
    where = (pages, key_lengths, cu_seqlens, ancestors)
    with full_precision(q.device):
        if impl == Impl.TRITON:
            from sevenfold.ops.attention import triton_pages

            call = triton_pages.Call(q, k_pages, v_pages, *where, scale, window)
            return triton_pages.attend(call)
        run = pages_reference.attend if impl == Impl.REFERENCE else pages_eager.attend
        return run(q, k_pages, v_pages, *where, scale=scale, window=window)


@_attend.register_fake
def _fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    key_lengths: Tensor,
    cu_seqlens: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
    window: int | None,
    impl: str,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v_pages.shape[-1])
