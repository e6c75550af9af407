"""Items of one allocation, copied and cleared where numbers on the device say."""

from sevenfold.ops.items.api import copy_and_clear, default_items_impl

__all__ = ["copy_and_clear", "default_items_impl"]
