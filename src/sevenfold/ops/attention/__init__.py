"""Softmax attention: grouped queries, packed sequences, sliding windows, cached and paged keys."""

from sevenfold.ops.attention.api import attention, attention_cached, default_attention_impl
from sevenfold.ops.attention.paged import attention_paged
from sevenfold.ops.attention.pages import attention_pages
from sevenfold.ops.attention.pages_write import write_pages
from sevenfold.ops.attention.tree import attention_paged_tree

__all__ = [
    "attention",
    "attention_cached",
    "attention_paged",
    "attention_paged_tree",
    "attention_pages",
    "default_attention_impl",
    "write_pages",
]
