"""What the loops share that numba compiles. Imported late: numba takes half a second to load."""

import numba
import torch

# Sums may be reordered; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
_MOST_THREADS: int = numba.get_num_threads()


def use_torch_threads() -> None:
    """Run the caller's compiled loops with as many threads as PyTorch uses, if numba has them."""
    numba.set_num_threads(min(torch.get_num_threads(), _MOST_THREADS))
