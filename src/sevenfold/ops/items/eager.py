"""Items copied and cleared in plain PyTorch."""

from torch import Tensor


def copy_and_clear(words: Tensor, places: Tensor, copied: int, cleared: int) -> None:
    """Arguments as the public operator's."""
    source, target, *cleared_at = places.tolist()
    if source != target:
        words[target : target + copied] = words[source : source + copied]
    for at in cleared_at:
        if at:
            words[at : at + cleared] = 0
