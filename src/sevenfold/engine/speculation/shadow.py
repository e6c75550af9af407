"""Guesses that nothing checks: the tokens that plain decoding gives tell whether they were right.

They cost the device nothing, and what they say is what a draft would have had accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.engine.speculation.pace import Pace
from sevenfold.engine.speculation.tree import ROOT, DraftTree


@dataclass(slots=True)
class Shadow:
    """A draft beside plain decoding.

    tree: the guesses.
    num_seen: tokens of the output that it has been compared with, or was made after.
    node: the last that was right.
    num_right: guesses that were right.
    is_over: whether a token was not guessed, or all were.
    """

    tree: DraftTree
    num_seen: int
    node: int = ROOT
    num_right: int = 0
    is_over: bool = False

    def follow(self, generated: Sequence[int], pace: Pace) -> None:
        """Compare the guesses with the tokens that have come, and note what is right."""
        while not self.is_over and self.num_seen < len(generated):
            child = self.tree.child(self.node, generated[self.num_seen])
            self.num_seen += 1
            if child is not None:
                self.node = child
                self.num_right += 1
                pace.follow(1)
            is_whole = child is not None and child not in self.tree.parents
            if child is None or is_whole:
                self.is_over = True
                pace.observe(self.num_right, is_whole=is_whole)
