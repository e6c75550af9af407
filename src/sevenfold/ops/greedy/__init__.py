"""The most probable token of each row, and whether its logits are numbers."""

from sevenfold.ops.greedy.api import (
    Greedy,
    advance_rows,
    are_finite,
    default_greedy_impl,
    greedy_tokens,
)

__all__ = ["Greedy", "advance_rows", "are_finite", "default_greedy_impl", "greedy_tokens"]
