"""Softmax attention of drafts over pages: a token sees what is computed, and its ancestors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sevenfold.ops.checks import check_device, check_dtype, check_shape


def attention_paged_tree(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    ancestors: Tensor,
    *,
    lengths: Sequence[int],
    past: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of a tree of draft tokens of each sequence, over pages with their keys.

        draft token t of sequence n, of depth d_t, sees
            token j < past[n]      where past[n] + d_t - j < window
            draft token s          where ancestors[n, t, s], and d_t - d_s < window

    Token j has its key in place j of the sequence's pages, draft token s in place past[n] + s.

    Args:
        q: [B, T, H, D]; B * T tokens hold the drafts of N sequences one after another.
        k_pages: [P, page_tokens, G, D], dtype of q; G divides H.
        v_pages: [P, page_tokens, G, V], dtype of q.
        pages: [N, M] int64, the pages of each sequence in the order of its places.
        ancestors: [N, A, A] bool, ancestors[n, t, s] says that s is t or an ancestor of t; A is no
            less than the longest draft.
        lengths: draft tokens of each sequence; they sum to B * T.
        past: tokens of each sequence before its draft.
        scale: multiplies the scores.
        window: tokens that a query sees, itself included, at least 1; None is all before it.

    Returns:
        [B, T, H, V] in v's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or value breaks the rules above.

    Source: SpecInfer (arXiv 2305.09781), section 4: a tree is a batch of chains that share keys.
    """
    _check(q, (k_pages, v_pages), pages, ancestors, (lengths, past))
    page_tokens, group = k_pages.shape[1], q.shape[2] // k_pages.shape[2]
    outputs = []
    for n, q_n in enumerate(q.flatten(0, 1).split(list(lengths))):
        num_keys = past[n] + lengths[n]
        used = pages[n, : -(-num_keys // page_tokens)]
        k, v = (x[used].flatten(0, 1)[:num_keys].transpose(0, 1) for x in (k_pages, v_pages))
        sees = visible_in_tree(ancestors[n, : lengths[n], : lengths[n]], past[n], window)
        o = F.scaled_dot_product_attention(
            q_n.transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=sees,
            scale=scale,
            enable_gqa=group > 1,
        )
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs).view(*q.shape[:3], -1)


def visible_in_tree(ancestors: Tensor, past: int, window: int | None) -> Tensor:
    """Return which keys each draft token sees, [T, past + T] bool, from ancestors [T, T]."""
    depth = ancestors.sum(-1) - 1
    before = ancestors.new_ones(len(depth), past)
    if window is not None:
        key = torch.arange(past, device=depth.device)
        before = (past + depth)[:, None] - key < window
        ancestors = ancestors & (depth[:, None] - depth < window)
    return torch.cat([before, ancestors], dim=1)


def _check(
    q: Tensor,
    stored: tuple[Tensor, Tensor],
    pages: Tensor,
    ancestors: Tensor,
    counts: tuple[Sequence[int], Sequence[int]],
) -> None:
    (k_pages, v_pages), (lengths, past) = stored, counts
    shape = (*k_pages.shape[:3], v_pages.shape[-1])
    check_shape("k_pages", k_pages, (*k_pages.shape[:3], q.shape[-1]), "[P, page_tokens, G, D]")
    check_shape("v_pages", v_pages, shape, "[P, page_tokens, G, V]")
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_dtype(name, x, (q.dtype,))
    check_shape("pages", pages, (len(lengths), pages.shape[-1]), "[N, M]")
    A = ancestors.shape[-1]
    check_shape("ancestors", ancestors, (len(lengths), A, A), "[N, A, A]")
    check_dtype("ancestors", ancestors, (torch.bool,))
    for name, x in (("pages", pages), ("ancestors", ancestors)):
        check_device(name, x, q.device)
    tokens = q.shape[0] * q.shape[1]
    if min(lengths) < 1 or max(lengths) > A or sum(lengths) != tokens:
        raise ValueError(
            f"lengths must lie in 1 to A = {A} and sum to B * T = {tokens}, got {list(lengths)}"
        )
    room = pages.shape[1] * k_pages.shape[1]
    if len(past) != len(lengths) or min(past) < 0:
        raise ValueError(f"past must be {len(lengths)} numbers >= 0, got {list(past)}")
    most = max(p + n for p, n in zip(past, lengths, strict=True))
    if most > room:
        raise ValueError(f"pages must have room for {most} keys, got room for {room}")
