"""Softmax attention over keys and values in pages, which sequences share and hold by number."""

from collections.abc import Sequence

from torch import Tensor

from sevenfold.ops.attention.api import attention_cached
from sevenfold.ops.checks import check_device, check_dtype, check_shape


def attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    *,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal softmax attention of new tokens over pages that already hold their keys.

        key of token t of sequence n = k_pages[pages[n, t // page_tokens], t % page_tokens]

    Args:
        q: [B, T, H, D]; B * T tokens hold the new tokens of N sequences one after another.
        k_pages: [P, page_tokens, G, D], dtype of q.
        v_pages: [P, page_tokens, G, V], dtype of q.
        pages: [N, M] int64, the pages of each sequence in the order of its tokens.
        lengths: new tokens of each sequence; they sum to B * T.
        key_lengths: keys of each sequence, the new tokens' included as its last ones.
        scale, window: as in attention.

    Returns:
        [B, T, H, V] in v's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or value breaks the rules above.
    """
    page_tokens = k_pages.shape[1]
    check_shape(
        "v_pages", v_pages, (*k_pages.shape[:3], v_pages.shape[-1]), "[P, page_tokens, G, V]"
    )
    check_shape("pages", pages, (len(lengths), pages.shape[-1]), "[N, M]")
    check_device("pages", pages, q.device)
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_dtype(name, x, (q.dtype,))
    used = -(-max(key_lengths, default=0) // page_tokens)
    if used > pages.shape[1]:
        raise ValueError(
            f"pages must have room for {max(key_lengths)} keys, got {pages.shape[1]} pages"
        )
    k, v = (x[pages[:, :used]].flatten(1, 2) for x in (k_pages, v_pages))  # [N, S, G, D]
    how = {"lengths": lengths, "key_lengths": key_lengths, "scale": scale, "window": window}
    return attention_cached(q, k, v, **how)
