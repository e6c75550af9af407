"""States that a scan keeps on its way, and the scan by parts that defines them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sevenfold.ops.lightning.decode_checks import check_state
from sevenfold.ops.lightning.segments import Stop


@dataclass(frozen=True)
class Snapshots:
    """States to keep: `stops` says which one goes to which slot of the pool.

    pool: [S, H, K, V] fp32 (fp64 with fp64 inputs), contiguous within a slot, whose slots may lie
        apart; written in place.
    stops: each the sequence, the number of its tokens after which its state is kept, from 1 to its
        length, and the slot, 0 to S - 1, of which no two are the same.
    """

    pool: Tensor
    stops: tuple[Stop, ...]


def check_snapshots(snapshots: Snapshots, q: Tensor, V: int) -> None:
    """Raise ValueError or TypeError unless pool and slots suit the tokens q [B, T, H, K]."""
    pool, (H, K) = snapshots.pool, q.shape[2:]
    check_state("pool", pool, q, (H, K, V))
    slots = [stop.slot for stop in snapshots.stops]
    if len(set(slots)) < len(slots) or not all(0 <= slot < len(pool) for slot in slots):
        raise ValueError(f"slot must differ and lie in 0 to {len(pool) - 1}, got {slots}")


def check_stops(stops: Sequence[Stop], lengths: Sequence[int]) -> None:
    """Raise ValueError unless every stop lies within its sequence."""
    for stop in stops:
        if not 0 <= stop.sequence < len(lengths):
            raise ValueError(f"sequence must lie in 0 to {len(lengths) - 1}, got {stop.sequence}")
        if not 1 <= stop.num_tokens <= lengths[stop.sequence]:
            raise ValueError(
                f"num_tokens must lie in 1 to {lengths[stop.sequence]}, the length of sequence "
                f"{stop.sequence}, got {stop.num_tokens}"
            )


def forward_by_parts(
    forward: Callable[..., tuple[Tensor, Tensor]],
    tokens: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    lengths: tuple[int, ...],
    snapshots: Snapshots,
) -> tuple[Tensor, Tensor]:
    """Run a forward of lengths part by part, from stop to stop, and keep the states between.

    Arguments and result as reference.forward's; tokens are q, k and v.
    """
    rows = [x.flatten(0, 1) for x in tokens]
    outputs, finals, start = [rows[2][:0]], [snapshots.pool[:0]], 0
    for n, length in enumerate(lengths):
        state = None if initial_state is None else initial_state[n : n + 1]
        own = [stop for stop in snapshots.stops if stop.sequence == n]
        for a, b in _parts(own, length):
            part = [x[None, start + a : start + b] for x in rows]
            o, state = forward(*part, log_decay, scale=scale, initial_state=state, lengths=(b - a,))
            outputs.append(o[0])
            for stop in own:
                if stop.num_tokens == b:
                    snapshots.pool[stop.slot] = state[0]
        finals.append(state)  # pyright: ignore[reportArgumentType]
        start += length
    return torch.cat(outputs).view(tokens[2].shape), torch.cat(finals)


def _parts(stops: Sequence[Stop], length: int) -> Iterator[tuple[int, int]]:
    """From the beginning to each stop and to the end; one part at least, which may be empty."""
    cuts = sorted({0, *(stop.num_tokens for stop in stops), length})
    return pairwise(cuts) if length else iter([(0, 0)])
