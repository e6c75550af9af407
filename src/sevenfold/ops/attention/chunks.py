"""Softmax attention of chunks of prompts over keys in pages, where the host knows every length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.attention import blocks_eager, chunks_cudnn
from sevenfold.ops.attention.chunks_blocks import Chunk, Means, attend_chunk
from sevenfold.ops.attention.join import join_eager
from sevenfold.ops.checks import check_device, check_dtype, check_shape, choose_impl
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

_IMPLS = (Impl.EAGER, Impl.CUDNN)
_EAGER = Means(blocks_eager.forward, join_eager)


# Below, the few blocks of a chunk take longer to launch than our kernel over pages takes in all: on
# an H200 0.96 ms against 0.63 at 5,001 tokens and 0.73 against 1.26 at 8,192, none before them.
_LEAST_KEYS = 8192


def suits_chunks(q: Tensor, v_pages: Tensor, lengths: Sequence[int], past: Sequence[int]) -> bool:
    """Whether attention_chunks takes cudnn, and so is faster than attention_pages.

    Where 1,024 new tokens or more are among 8,192 of a sequence, in bf16 or fp16 on a GPU of
    compute capability 9.0, with widths D = V that are a multiple of 8 up to 128.
    """
    if chunks_cudnn.refusal(q, v_pages, lengths) is not None:
        return False
    pairs = zip(lengths, past, strict=True)
    return any(chunks_cudnn.is_long(n) and n + seen >= _LEAST_KEYS for n, seen in pairs)


def attention_chunks(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    *,
    lengths: Sequence[int],
    past: Sequence[int],
    scale: float,
    impl: Impl | str | None = None,
) -> Tensor:
    """Causal softmax attention of chunks of prompts over pages that already hold their keys.

        o_t = sum_j softmax_j(scale * q_t^T k_j) v_j    over all keys j up to t's own
        key j of sequence n = k_pages[pages[n, j // page_tokens], j % page_tokens]

    What attention_pages gives for packed rows, up to rounding: a chunk is attended to block by
    block, so how a prompt is cut changes bits. It waits for nothing and takes no gradient.

    Args:
        q: [B, T, H, D]; B * T tokens hold the new tokens of N sequences one after another.
        k_pages: [P, page_tokens, G, D], dtype of q; pages may lie apart. G divides H: query head h
            reads key head h * G // H.
        v_pages: [P, page_tokens, G, D], dtype of q.
        pages: [N, M] int32 or int64, the pages of each sequence in the order of its tokens.
        lengths: new tokens of each sequence; they sum to B * T.
        past: tokens of each sequence before the new ones.
        scale: multiplies the scores.
        impl: "eager", or "cudnn": chunks of 1,024 tokens or more by cuDNN, where there are any, and
            shorter ones beside them as attention_pages' "triton". None takes it where
            suits_chunks, else eager. A named one never falls back.

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: a shape, device or number breaks the rules above; the message names both.
        TypeError: a dtype breaks them.
        UnsupportedError: the implementation cannot serve the arguments.
    """
    _check(q, k_pages, v_pages, pages)
    _check_lengths(q, pages.shape[1] * k_pages.shape[1], len(pages), lengths, past)
    suits = suits_chunks(q, v_pages, lengths, past)
    default = Impl.CUDNN if suits else Impl.EAGER
    chosen = choose_impl("attention_chunks", impl, default, _IMPLS)
    if chosen is Impl.CUDNN and (refusal := chunks_cudnn.refusal(q, v_pages, lengths)):
        raise UnsupportedError(refusal)
    rows = q.flatten(0, 1).split(list(lengths))
    chunks = [
        Chunk(x, k_pages, v_pages, own, seen, scale)
        for x, own, seen in zip(rows, pages, past, strict=True)
    ]
    with torch.no_grad(), full_precision(q.device):
        if chosen is Impl.CUDNN:
            found = chunks_cudnn.attend(chunks)
        else:
            cut = chunks_cudnn.CUT
            found = [attend_chunk(x, cut, _EAGER) if len(x.q) else x.q for x in chunks]
    o = found[0] if len(found) == 1 else torch.cat(found)
    return o.reshape(q.shape)


def _check(q: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor) -> None:
    for name, x in (("q", q), ("k_pages", k_pages)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {x.dim()}")
    letters, shape = "[P, page_tokens, G, D]", (*k_pages.shape[:3], q.shape[3])
    G = k_pages.shape[2]
    if G < 1 or q.shape[2] % G:
        raise ValueError(f"k_pages' heads must divide the {q.shape[2]} query heads, got {G}")
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_shape(name, x, shape, letters)
        check_dtype(name, x, (q.dtype,))
        check_device(name, x, q.device)
    check_dtype("pages", pages, (torch.int32, torch.int64))
    check_device("pages", pages, q.device)


def _check_lengths(
    q: Tensor, room: int, N: int, lengths: Sequence[int], past: Sequence[int]
) -> None:
    tokens = q.shape[0] * q.shape[1]
    if len(lengths) != N or min(lengths, default=-1) < 0 or sum(lengths) != tokens:
        raise ValueError(
            f"lengths must be N = {N} numbers >= 0 that sum to B * T = {tokens}, "
            f"got {list(lengths)}"
        )
    if len(past) != N or min(past, default=-1) < 0:
        raise ValueError(f"past must be N = {N} numbers >= 0, got {list(past)}")
    totals = [seen + new for seen, new in zip(past, lengths, strict=True)]
    if max(totals) > room:
        raise ValueError(f"pages must have room for {max(totals)} tokens, got {room}")
