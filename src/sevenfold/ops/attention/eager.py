"""Softmax attention through PyTorch's scaled_dot_product_attention."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def one_sequence(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """One sequence; arguments and result as in reference.one_sequence."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return causal(*heads_first, scale=scale, window=window)[0].transpose(0, 1)


def cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """q [N, Tq, H, D] over the filled places of k, v [N, S, G, D]; Tq is 1 if they differ."""
    places = max(key_lengths)
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, :places], v[:, :places]))
    if len(set(key_lengths)) == 1:
        return causal(q, k, v, scale=scale, window=window).transpose(1, 2)
    last = torch.tensor(key_lengths, device=q.device)[:, None]
    place = torch.arange(places, device=q.device)
    visible = place < last
    # A mask hides no NaN: its weight is zero, and zero times NaN is none.
    k, v = (x.masked_fill(~visible[:, None, :, None], 0) for x in (k, v))
    if window is not None:
        visible &= place >= last - window
    return _sdpa(q, k, v, scale, mask=visible[:, None, None]).transpose(1, 2)


def causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Equal sequences at once; q [B, H, Tq, D] are the last tokens of k, v [B, G, Tk, D]."""
    Tq, Tk = q.shape[2], k.shape[2]
    if window is not None and window < Tk:
        return _windowed(q, k, v, scale, window)
    if Tq == Tk:
        return _sdpa(q, k, v, scale, is_causal=True)
    if Tq == 1:
        return _sdpa(q, k, v, scale)
    return _sdpa(q, k, v, scale, mask=_visible(Tq, Tk, None, q.device))


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Queries by the window's length, each with the keys it can see: cost T x window, not T^2."""
    Tq, Tk = q.shape[2], k.shape[2]
    outputs = []
    for start in range(0, Tq, window):
        end = min(start + window, Tq)
        last = Tk - Tq + end
        first = max(0, Tk - Tq + start + 1 - window)
        mask = _visible(end - start, last - first, window, q.device)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        outputs.append(_sdpa(q[:, :, start:end], keys, values, scale, mask=mask))
    return torch.cat(outputs, dim=2)


def _visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    visible = key <= query
    return visible if window is None else visible & (query - key < window)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
