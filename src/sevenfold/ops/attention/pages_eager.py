"""Attention over pages in plain PyTorch: pages gathered, the rest by a mask. Waits for lengths."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    key_lengths: Tensor,
    cu_seqlens: Tensor | None,
    ancestors: Tensor | None,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Arguments and result as in the public operator."""
    o = q.new_zeros(*q.shape[:3], v_pages.shape[-1])
    rows, out = q.flatten(0, 1), o.flatten(0, 1)
    grouped = q.shape[2] != k_pages.shape[2]
    for n, (keys, span) in enumerate(_spans(q, key_lengths, cu_seqlens)):
        if keys == 0 or span.start == span.stop:
            continue
        table = pages[n, : -(-keys // k_pages.shape[1])].long()
        k, v = (x[table].flatten(0, 1)[:keys].transpose(0, 1) for x in (k_pages, v_pages))
        tree = None if ancestors is None else ancestors[n]
        sees = _visible(span.stop - span.start, keys, tree, window, q.device)
        query = rows[span].transpose(0, 1)  # [H, T, D]
        got = F.scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=sees, scale=scale, enable_gqa=grouped
        )
        out[span] = got[0].transpose(0, 1)
    return o


def _spans(
    q: Tensor, key_lengths: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[int, slice]]:
    """Keys of each sequence, and where its rows lie."""
    T = q.shape[1]
    starts = range(0, len(q) * T + 1, T) if cu_seqlens is None else cu_seqlens.tolist()
    for n, keys in enumerate(key_lengths.tolist()):
        yield keys, slice(starts[n], starts[n + 1])


def _visible(
    T: int, keys: int, ancestors: Tensor | None, window: int | None, device: torch.device
) -> Tensor:
    """[T, keys] whether a new token sees a key."""
    place = torch.arange(keys, device=device)
    if ancestors is None:
        ancestors = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    own = keys - T + ancestors.sum(-1) - 1
    place = torch.cat([place[: keys - T], own])
    before = torch.ones(T, keys - T, dtype=torch.bool, device=device)
    sees = torch.cat([before, ancestors], -1)
    return sees if window is None else sees & (own[:, None] - place < window)
