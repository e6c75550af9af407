"""How a packed row is divided among context ranks: contiguous stretches, in the tokens' order.

One order for the whole model: linear layers need neighbours side by side, and softmax layers, one
in eight, take the row as it lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sevenfold.models import Batch


@dataclass(frozen=True)
class ContextBatch(Batch):
    """One rank's stretch of a packed row; its sequences are the pieces of documents in it.

    first_token: the stretch's place in the row.
    crosses: whether any document reaches over a border between any two ranks.
    enters: whether this stretch begins inside a document.
    distances: [ranks] int64 on the device; tokens between the end of each rank's stretch and the
        beginning of this one, where the document that enters reaches back to it, else -1.
    ahead: [ranks] int64 on the device; the same seen from the end of this stretch: tokens up to the
        beginning of each later one that the last document here enters, else -1.
    """

    first_token: int
    crosses: bool
    enters: bool
    distances: Tensor
    ahead: Tensor


def divide_row(
    lengths: Sequence[int], num_ranks: int, rank: int, *, device: torch.device
) -> ContextBatch:
    """Cut a row of documents into equal stretches, and describe one of them.

    Args:
        lengths: tokens of each document of the whole row, at least 1.
        num_ranks: context ranks; they divide the sum of the lengths.
        rank: whose stretch.
        device: the model's.

    Returns:
        The rank's batch; a piece that continues a document has the earlier tokens as its past, so
        positions go on across the border.

    Raises:
        ValueError: the row cannot be divided evenly.
    """
    total = sum(lengths)
    if total % num_ranks:
        raise ValueError(f"num_ranks must divide the row's {total} tokens, got {num_ranks}")
    size = total // num_ranks
    starts = [0, *accumulate(lengths)]
    own = _pieces(starts, rank * size, (rank + 1) * size)
    base = Batch.packed([n for _, n in own], past=[past for past, _ in own], device=device)
    # The first token of the document that each border lies in; the border itself if it is none.
    begun = [max(s for s in starts if s <= border) for border in range(0, total, size)]
    entered = [begun[r] < r * size for r in range(num_ranks)]
    return ContextBatch(
        lengths=base.lengths,
        past=base.past,
        positions=base.positions,
        cu_seqlens=base.cu_seqlens,
        first_token=rank * size,
        crosses=any(entered),
        enters=entered[rank],
        distances=_table([_distance(begun, p, rank, size) for p in range(num_ranks)], device),
        ahead=_table([_distance(begun, rank, r, size) for r in range(num_ranks)], device),
    )


def stretch_of(batch: Batch, state: object) -> ContextBatch:
    """Return the batch as a rank's stretch of a row.

    Raises:
        TypeError: it is a whole batch, or there is a state, which goes between calls and not ranks.
    """
    if not isinstance(batch, ContextBatch) or state is not None:
        raise TypeError(
            f"batch must be a ContextBatch (see divide_row) without a state under context "
            f"parallelism, got {type(batch).__name__} and {type(state).__name__}"
        )
    return batch


def _pieces(starts: Sequence[int], first: int, end: int) -> list[tuple[int, int]]:
    """Past and length of each piece of a document between two tokens of the row."""
    found = []
    for a, b in pairwise(starts):
        if max(a, first) < min(b, end):
            found.append((max(0, first - a), min(b, end) - max(a, first)))
    return found


def _distance(begun: Sequence[int], source: int, target: int, size: int) -> int:
    """Tokens between two stretches, if one document reaches from the source into the target."""
    end, start = (source + 1) * size, target * size
    return start - end if source < target and begun[target] < end else -1


def _table(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)
