"""Cross-entropy of a linear head whose logits never exist whole."""

from sevenfold.ops.cross_entropy.api import (
    IGNORED_LABEL,
    default_cross_entropy_impl,
    linear_cross_entropy,
)

__all__ = ["IGNORED_LABEL", "default_cross_entropy_impl", "linear_cross_entropy"]
