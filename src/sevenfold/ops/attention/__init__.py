"""Softmax attention: grouped queries, packed sequences, sliding windows, cached and paged keys."""

from sevenfold.ops.attention.api import attention, attention_cached, default_attention_impl
from sevenfold.ops.attention.block import Block
from sevenfold.ops.attention.blocks import (
    attention_block,
    attention_block_backward,
    default_block_impl,
    join_blocks,
)
from sevenfold.ops.attention.chunks import attention_chunks, suits_chunks
from sevenfold.ops.attention.kept import KeptResult, attention_kept, suits_keeping
from sevenfold.ops.attention.paged import attention_paged
from sevenfold.ops.attention.pages import attention_pages
from sevenfold.ops.attention.pages_write import write_pages
from sevenfold.ops.attention.tree import attention_paged_tree

__all__ = [
    "Block",
    "KeptResult",
    "attention",
    "attention_block",
    "attention_block_backward",
    "attention_cached",
    "attention_chunks",
    "attention_kept",
    "attention_paged",
    "attention_paged_tree",
    "attention_pages",
    "default_attention_impl",
    "default_block_impl",
    "join_blocks",
    "suits_chunks",
    "suits_keeping",
    "write_pages",
]
