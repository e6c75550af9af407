"""Softmax attention: grouped queries, packed sequences, sliding windows, cached and paged keys."""

from sevenfold.ops.attention.api import attention, attention_cached, default_attention_impl
from sevenfold.ops.attention.paged import attention_paged

__all__ = ["attention", "attention_cached", "attention_paged", "default_attention_impl"]
