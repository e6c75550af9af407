"""An expert's capacity, shared over the tokens of the ranks that hold one copy of the experts."""

import numpy as np
import torch

from sevenfold.ops import Dispatch
from sevenfold.parallel.config import ParallelConfig
from sevenfold.parallel.layout import Place
from sevenfold.parallel.reading import sent


def order_of_pieces(config: ParallelConfig, place: Place, num_groups: int) -> list[int]:
    """Sort all pieces of the ranks that share an expert's capacity by their tokens' order.

    Args:
        config: degrees.
        place: of one of the ranks.
        num_groups: token groups of each rank; each has a piece of every stretch.

    Returns:
        Indices into [ranks, stretches, token groups], flat, the first tokens first.
    """
    size = config.expert * config.expert_width
    weights = place.data % config.shard * config.context + place.context
    first = (weights * config.tensor + place.tensor) // size * size
    keys = []
    for rank in range(first, first + size):
        row, tensor = divmod(rank, config.tensor)
        data, context = divmod(row, config.context)
        stretches = (context, 2 * config.context - 1 - context) if config.context > 1 else (0,)
        keys += [(data, s, tensor, n) for s in stretches for n in range(num_groups)]
    return sorted(range(len(keys)), key=keys.__getitem__)


def share_capacity(counts: np.ndarray, capacity: int) -> np.ndarray:
    """Give each expert's capacity to the pieces in their order.

        quota_p = min(count_p, max(0, capacity - sum over q < p of count_q))

    Args:
        counts: [pieces, E] choices, in the tokens' order.
        capacity: rows that one expert takes in the whole group.

    Returns:
        [pieces, E].
    """
    earlier = counts.cumsum(0) - counts
    return np.minimum(counts, np.maximum(capacity - earlier, 0))


def limited(plan: Dispatch, counts: np.ndarray, quota: np.ndarray) -> Dispatch:
    """Keep the first choices of each expert in each piece.

    Args:
        plan: of all choices.
        counts: [pieces, E], choices of each expert in the tokens' pieces.
        quota: [pieces, E], how many of them stay, the first.
    """
    if np.array_equal(counts, quota):
        return plan
    device, R = plan.choice.device, int(quota.sum())
    # The plan is sorted by expert, and within an expert by token: piece after piece.
    dropped = (counts - quota).T.ravel()
    numbers = [quota.T.ravel(), dropped.cumsum() - dropped, quota.sum(0)]
    stay, dropped_before, rows_per_expert = sent(numbers, device)
    kept = torch.arange(R, device=device)
    piece = torch.repeat_interleave(stay, output_size=R)
    choice = plan.choice[kept + dropped_before[piece]]
    row = torch.full((plan.row.numel(),), R, device=device)
    row[choice] = kept
    return Dispatch(choice, row.view(plan.row.shape), rows_per_expert, is_full=True)
