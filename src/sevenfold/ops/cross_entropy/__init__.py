"""Cross-entropy of a linear head whose logits never exist whole."""

from sevenfold.ops.cross_entropy.api import IGNORED_LABEL, linear_cross_entropy

__all__ = ["IGNORED_LABEL", "linear_cross_entropy"]
