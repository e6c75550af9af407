"""Lightning attention of a row that is filled in part, by numbers on the device; the operator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sevenfold.ops.checks import choose_impl
from sevenfold.ops.lightning import triton_op
from sevenfold.ops.lightning.api import IMPLS, check, default_impl, forward_of
from sevenfold.ops.lightning.decode_checks import check_state
from sevenfold.ops.lightning.padded_cuts import PaddedCuts
from sevenfold.ops.lightning.segments import Plan, Room, Stop
from sevenfold.ops.lightning.snapshots import Snapshots, forward_by_parts
from sevenfold.ops.precision import full_precision
from sevenfold.ops.types import Impl

_ONE_SEGMENT = Room(num_heads=1, num_dealt=1, num_programs=1, chunk_tokens=1, most_slots=0)


@dataclass(frozen=True)
class PaddedSnapshots:
    """States to keep of a row that is filled in part.

    pool: as Snapshots'.
    plan: PaddedCuts.plan of the row: how many of its tokens count, and which state goes where.
    """

    pool: Tensor
    plan: Plan


def padded_cuts(
    num_tokens: int, widths: tuple[int, int, int], most_stops: int, where: Tensor
) -> PaddedCuts:
    """Return how lightning_attention_padded cuts a row.

    Args:
        num_tokens: T of the row.
        widths: H, K and V.
        most_stops: states that a run keeps, at most.
        where: any tensor of the tokens' dtype on their device.
    """
    room = _ONE_SEGMENT
    if default_impl(where.device, where.dtype, *widths[1:]) is Impl.TRITON:
        room = triton_op.padded_room(num_tokens, widths, where)
    return PaddedCuts(num_tokens, most_stops, room, where.device)


def lightning_attention_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    padded: PaddedSnapshots,
    states: Tensor,
    slots: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    impl: Impl | str | None = None,
) -> Tensor:
    """lightning_attention_prefill of one sequence that fills its row in part.

    How many tokens count, and which states go where, are numbers on the device: with impl "triton"
    nothing waits for them, and a CUDA graph that holds the operator reads them at each replay. No
    token that counts depends on one that does not, be it no number. It takes no gradient.

    Args:
        q, k, v: [1, T, H, K] and [1, T, H, V], as in lightning_attention. What does not count may
            be overwritten.
        log_decay, scale, impl: as in lightning_attention.
        padded: the pool, and the numbers of at least one token; they are not checked.
        states: a pool as padded's, to which the state after the last token that counts goes.
        slots: [1] int64, where in it; not checked.
        initial_state: [1, H, K, V], elsewhere.

    Returns:
        o [1, T, H, V], of any value where tokens do not count.

    Raises:
        ValueError, TypeError, UnsupportedError: as lightning_attention.

    Source: as lightning_attention.
    """
    B = check(q, k, v, log_decay, initial_state, None)
    if B != 1:
        raise ValueError(f"q must be one row [1, T, H, K], got {B} rows")
    for name, pool in (("pool", padded.pool), ("states", states)):
        check_state(name, pool, q, (*q.shape[2:], v.shape[-1]))
    default = default_impl(q.device, q.dtype, q.shape[-1], v.shape[-1])
    chosen = choose_impl("lightning_attention_padded", impl, default, IMPLS)
    options = {"scale": scale, "initial_state": initial_state}
    with torch.no_grad(), full_precision(q.device):
        if chosen is Impl.TRITON:
            how = {"kept": (padded.pool, padded.plan), "left": (states, slots)}
            return triton_op.forward_padded((q, k, v), log_decay, **how, **options)
        num_tokens, stops = _read(padded.plan)
        found, final = forward_by_parts(
            forward_of(chosen, q, v),
            (q[:, :num_tokens], k[:, :num_tokens], v[:, :num_tokens]),
            log_decay,
            lengths=(num_tokens,),
            snapshots=Snapshots(padded.pool, stops),
            **options,
        )
    states[slots] = final
    o = torch.zeros_like(v)
    o[:, :num_tokens] = found
    return o


def _read(plan: Plan) -> tuple[int, tuple[Stop, ...]]:
    """How many tokens count, and the states to keep."""
    stops, kept, num_tokens = [], plan.stops.tolist(), 0
    for start, end, *_, first_stop, end_stop, _ in plan.segments.tolist():
        num_tokens = max(num_tokens, end)
        stops += [Stop(0, start + tokens, slot) for tokens, slot in kept[first_stop:end_stop]]
    return num_tokens, tuple(stops)
