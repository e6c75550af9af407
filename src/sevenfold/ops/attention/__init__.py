"""Softmax attention: grouped queries, packed sequences, sliding windows, cached keys."""

from sevenfold.ops.attention.api import attention, attention_cached

__all__ = ["attention", "attention_cached"]
