"""Items copied and cleared in plain PyTorch."""

from torch import Tensor


def copy_and_clear(words: Tensor, copied: Tensor, places: Tensor, cleared: int) -> None:
    """Arguments as the public operator's."""
    source, *cleared_at = places.tolist()
    copied[:] = words[source : source + len(copied)]
    for at in cleared_at:
        if at:
            words[at : at + cleared] = 0
