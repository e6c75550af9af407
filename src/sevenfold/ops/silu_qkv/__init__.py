"""SiLU of a query-key-value projection."""

from sevenfold.ops.silu_qkv.api import default_silu_qkv_impl, silu_qkv

__all__ = ["default_silu_qkv_impl", "silu_qkv"]
