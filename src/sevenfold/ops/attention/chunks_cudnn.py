"""Chunks of prompts over pages: long ones by cuDNN, one by one; the rest by our own kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.ops.attention import blocks_flash, cudnn
from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.chunks_blocks import Chunk, Means, attend_chunk
from sevenfold.ops.attention.chunks_plan import Cut, is_round

# A unit fills a GPU: its tiles of 128 rows, of each of 16 heads, are as many as multiprocessors.
# At most as many keys and values lie end to end at a time as take 268 MB at 8 key heads of 128, and
# to join what they give costs a hundredth of their products.
CUT = Cut(unit_tokens=1024, most_tokens=65_536)


def refusal(q: Tensor, v: Tensor, lengths: Sequence[int]) -> str | None:
    """Why it cannot serve a call, or would serve none of its chunks, if so."""
    longest = max(lengths, default=0)
    if not is_long(longest):
        return (
            f"lengths must have one of {CUT.unit_tokens} tokens or more for impl cudnn, got at "
            f"most {longest}"
        )
    return cudnn.refusal(q, v)


def attend(chunks: Sequence[Chunk]) -> list[Tensor]:
    """o of each chunk, one of which is long at least; their pages are rows of one table."""
    # Triton takes a while to import: only who needs it waits for it.
    from sevenfold.ops.attention.triton_join import join

    means = Means(_attend_block, join)
    found = [attend_chunk(x, CUT, means) if is_long(len(x.q)) else x.q for x in chunks]
    short = [n for n, chunk in enumerate(chunks) if not is_long(len(chunk.q))]
    if any(len(chunks[n].q) for n in short):
        for n, o in zip(short, _attend_short([chunks[n] for n in short]), strict=True):
            found[n] = o
    return found


def _attend_short(chunks: Sequence[Chunk]) -> Sequence[Tensor]:
    """o of each chunk, all at once."""
    from sevenfold.ops.attention import triton_pages

    device, one = chunks[0].q.device, chunks[0]
    lengths = [len(chunk.q) for chunk in chunks]
    totals = [chunk.past + length for chunk, length in zip(chunks, lengths, strict=True)]
    q = torch.cat([chunk.q for chunk in chunks])[None]
    pages = torch.stack([chunk.pages for chunk in chunks])
    where = (pages, blocks_flash.sent(totals, device), blocks_flash.borders(lengths, device), None)
    call = triton_pages.Call(q, one.k_pages, one.v_pages, *where, one.scale, None)
    return triton_pages.attend(call)[0].split(lengths)


def is_long(tokens: int) -> bool:
    """Whether so many new tokens of a sequence go by blocks."""
    return tokens >= CUT.unit_tokens


def _attend_block(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """cuDNN where shapes are few; else FlashAttention, which needs no plan for a shape."""
    if is_round(len(q), CUT) and is_round(len(k), CUT):
        return cudnn.with_lse(q, k, v, scale=block.scale, causal=block.causal)
    return blocks_flash.forward(q, k, v, block)
