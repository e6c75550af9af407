"""Attention over pages as its formula reads: one token at a time over the keys that it sees."""

import torch
from torch import Tensor


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
    rows, dtype = q.flatten(0, 1), torch.promote_types(q.dtype, torch.float32)
    o = rows.new_zeros(*rows.shape[:2], v_pages.shape[-1])
    group = q.shape[2] // k_pages.shape[2]
    T = q.shape[1]
    starts = range(0, len(rows) + 1, T) if cu_seqlens is None else cu_seqlens.tolist()
    for n, keys in enumerate(key_lengths.tolist()):
        length, table = starts[n + 1] - starts[n], pages[n]
        for t in range(length):
            seen = _seen(t, keys, length, None if ancestors is None else ancestors[n], window)
            if keys == 0 or not seen:
                continue
            at = torch.tensor(seen, device=q.device)
            where = (table[at // k_pages.shape[1]].long(), at % k_pages.shape[1])
            k, v = (x[where].to(dtype).repeat_interleave(group, 1) for x in (k_pages, v_pages))
            row = starts[n] + t
            scores = scale * torch.einsum("hd,thd->ht", rows[row].to(dtype), k)
            o[row] = torch.einsum("ht,thv->hv", scores.softmax(-1), v).to(o.dtype)
    return o.view(*q.shape[:3], -1)


def _seen(
    t: int, keys: int, length: int, ancestors: Tensor | None, window: int | None
) -> list[int]:
    """Numbers of the keys that new token t of a sequence sees."""
    base = keys - length
    if ancestors is None:
        drafted, depth = list(range(t + 1)), list(range(length))
    else:
        drafted = ancestors[t].nonzero().flatten().tolist()
        depth = [int(row.sum()) - 1 for row in ancestors]
    places = {j: j for j in range(base)} | {base + s: base + depth[s] for s in drafted}
    own = base + depth[t]
    return [j for j, place in places.items() if window is None or own - place < window]
