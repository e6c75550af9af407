"""Linear layer: x W^T through the fastest matrix product of the device."""

from sevenfold.ops.linear.api import (
    default_linear_impl,
    head_logits,
    head_logits_into,
    linear,
    room_for_logits,
    weight_product,
)

__all__ = [
    "default_linear_impl",
    "head_logits",
    "head_logits_into",
    "linear",
    "room_for_logits",
    "weight_product",
]
