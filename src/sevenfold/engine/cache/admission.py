"""Where a prompt's prefill should write snapshots."""

from collections.abc import Sequence
from typing import NamedTuple

FIRST_SPACED_TOKENS = 1024
MOST_MARKS = 16  # the last, of which each may have a snapshot; the first always has one
DECODE_INTERVAL_TOKENS = 64


class PromptPlaces(NamedTuple):
    """What is known about a prompt when it is admitted.

    num_tokens: of the prompt; after a preemption, with the output so far.
    marks: rising token counts where its caller says that a turn, or what others share, ends.
    branch_tokens: where other requests have been seen to leave its path; 0 for nowhere.
    known_tokens: what it goes on from: places before need not be chosen.
    """

    num_tokens: int
    marks: Sequence[int]
    branch_tokens: int
    known_tokens: int = 0


def wanted_snapshots(places: PromptPlaces, page_tokens: int) -> dict[int, bool]:
    """Choose token counts, all of them multiples of page_tokens, at which to keep the state.

    Needed ones: the first mark (the system prompt ends), the last (the generation prompt begins),
    the prompt's end unless the last mark is in the block before it, and the branch. The others are
    good to have: of the other marks the last MOST_MARKS, and 1,024 * 2**n tokens where nothing else
    lies within a quarter of it. So their number grows with the logarithm.

    Args:
        places: the prompt.
        page_tokens: of a block.

    Returns:
        Token count -> whether it is needed.
    """
    # A turn that ends inside the first block has no border before its end.
    marks = [mark // page_tokens * page_tokens for mark in places.marks if mark >= page_tokens]
    wanted = dict.fromkeys(marks[-MOST_MARKS:], False)
    needed = [*marks[:1], *marks[-1:], places.branch_tokens // page_tokens * page_tokens]
    end = (places.num_tokens - 1) // page_tokens * page_tokens
    if not marks or end - marks[-1] > page_tokens:
        needed.append(end)
    wanted.update(dict.fromkeys(needed, True))
    spaced = FIRST_SPACED_TOKENS
    while spaced < places.num_tokens:
        at = spaced // page_tokens * page_tokens
        if at > places.known_tokens and all(abs(at - other) * 4 > at for other in wanted):
            wanted[at] = False
        spaced *= 2
    wanted.pop(0, None)
    return wanted


def decode_snapshot(first: int, end: int, page_tokens: int) -> int | None:
    """Return the last token count in (first, end] at which decoding keeps its state, or None.

    Every 64 tokens, or whole pages that come to as many: the end of the output cannot be foreseen,
    and a state cannot be taken back to a border that lies behind it.
    """
    interval = -(-DECODE_INTERVAL_TOKENS // page_tokens) * page_tokens
    last = end // interval * interval
    return last if last > first else None
