"""Lightning attention by Triton kernels, as operators that torch knows: compiled and captured.

Importing this file imports no Triton; the kernels are imported by the first run.
"""

from typing import Any

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.lightning.lengths import read_lengths
from sevenfold.ops.lightning.segments import Plan, Room, Stop
from sevenfold.ops.lightning.snapshots import Snapshots, check_stops
from sevenfold.ops.operator import operator

MAX_WIDTH = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run every sequence; arguments and result as in the public operator."""
    check_supported(q, v)
    o, final = lightning_scan(
        q, k, v, log_decay, float(scale), initial_state, cu_seqlens, with_final
    )
    return o, final if with_final else None


def forward_with_snapshots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    snapshots: Snapshots,
) -> tuple[Tensor, Tensor]:
    """Run every sequence and keep states on the way; o and the final states."""
    check_supported(q, v)
    stops = [number for stop in snapshots.stops for number in stop]
    return lightning_scan_keep(
        q, k, v, log_decay, float(scale), initial_state, cu_seqlens, snapshots.pool, stops
    )


def forward_padded(
    tokens: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    kept: tuple[Tensor, Plan],
    left: tuple[Tensor, Tensor],
) -> Tensor:
    """Run the tokens of a row that the plan counts, q, k and v: o.

    kept: a pool, and the plan with the states that go to it.
    left: a pool and a slot [1] of it, for the state after the last token.
    """
    check_supported(tokens[0], tokens[2])
    (pool, plan), state_in = kept, initial_state
    tables = (plan.segments, plan.pieces, plan.chains, plan.stops, plan.deal)
    return lightning_scan_padded(*tokens, log_decay, float(scale), state_in, *left, pool, *tables)


def padded_room(num_tokens: int, widths: tuple[int, int, int], where: Tensor) -> Room:
    """What cuts must suit of tokens of widths H, K, V in the dtype and on the device of `where`."""
    from sevenfold.ops.lightning.triton_launch import Scan, plan_room

    H, K, V = widths
    q, v = (where.new_empty(1, 0, H, width) for width in (K, V))
    return plan_room(Scan(q, q, v, where, 1.0, (num_tokens,)))


def check_supported(q: Tensor, v: Tensor) -> None:
    """Raise UnsupportedError unless the kernels take such a device, widths and dtype."""
    if q.device.type != "cuda":
        raise UnsupportedError(f"q must lie on a GPU for impl triton, got {q.device}")
    if q.dtype not in _DTYPES:
        raise UnsupportedError(f"q must be bf16, fp16 or fp32 for impl triton, got {q.dtype}")
    for name, x in (("K", q), ("V", v)):
        if not 1 <= x.shape[-1] <= MAX_WIDTH:
            raise UnsupportedError(
                f"{name} must lie in 1 to {MAX_WIDTH} for impl triton, got {x.shape[-1]}"
            )


@operator("sevenfold::lightning_scan")
def lightning_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final: bool,
) -> tuple[Tensor, Tensor]:
    """o, and the final states, of which there are none unless with_final."""
    from sevenfold.ops.lightning.triton_launch import Scan, run_scan

    lengths = read_lengths(q.shape[0], q.shape[1], cu_seqlens)
    final = _states(q, v, len(lengths) if with_final else 0)
    state_in = None if initial_state is None else initial_state.contiguous()
    state_out = final if with_final else None
    return run_scan(Scan(q, k, v, log_decay, scale, lengths, state_in, state_out)), final


@lightning_scan.register_fake
def _(q, k, v, log_decay, scale, initial_state, cu_seqlens, with_final):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), _states(q, v, N if with_final else 0)


@torch.library.custom_op("sevenfold::lightning_scan_keep", mutates_args=("pool",))
def lightning_scan_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    pool: Tensor,
    stops: list[int],
) -> tuple[Tensor, Tensor]:
    """lightning_scan without a gradient, which writes states to the pool; stops flattened."""
    from sevenfold.ops.lightning.triton_launch import Scan, run_scan

    lengths = read_lengths(q.shape[0], q.shape[1], cu_seqlens)
    kept = tuple(Stop(*stops[i : i + 3]) for i in range(0, len(stops), 3))
    check_stops(kept, lengths)
    final = _states(q, v, len(lengths))
    state_in = None if initial_state is None else initial_state.contiguous()
    scan = Scan(q, k, v, log_decay, scale, lengths, state_in, final, pool, kept)
    return run_scan(scan), final


@lightning_scan_keep.register_fake
def _(q, k, v, log_decay, scale, initial_state, cu_seqlens, pool, stops):
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), _states(q, v, N)


@torch.library.custom_op(
    "sevenfold::lightning_scan_padded", mutates_args=("q", "k", "v", "states", "pool")
)
def lightning_scan_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    states: Tensor,
    slots: Tensor,
    pool: Tensor,
    segments: Tensor,
    pieces: Tensor,
    chains: Tensor,
    stops: Tensor,
    deal: Tensor | None,
) -> Tensor:
    """lightning_scan_keep of one sequence that fills its row in part; tables as segments.Plan's.

    The final state goes to slots [1] of states.
    """
    from sevenfold.ops.lightning.triton_launch import Scan, run_padded

    plan = Plan(segments, pieces, chains, stops, len(pieces), deal)
    state_in = None if initial_state is None else initial_state.contiguous()
    lengths = (q.shape[1],)
    scan = Scan(q, k, v, log_decay, scale, lengths, state_in, None, pool, plan=plan)
    return run_padded(scan, states, slots)


@lightning_scan_padded.register_fake
def _(
    q,
    k,
    v,
    log_decay,
    scale,
    initial_state,
    states,
    slots,
    pool,
    segments,
    pieces,
    chains,
    stops,
    deal,
):
    return v.new_empty(v.shape)


@operator("sevenfold::lightning_step")
def lightning_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token of each sequence, without a gradient: o, and new states."""
    from sevenfold.ops.lightning import triton_decode

    return triton_decode.step(q, k, v, log_decay, state, scale)


@lightning_step.register_fake
def _(q, k, v, log_decay, state, scale):
    return v.new_empty(v.shape), state.new_empty(state.shape)


@operator("sevenfold::lightning_scan_backward")
def lightning_scan_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradient of the initial states, of which there is none without them.

    With the scan LA(q, k, v) and LA' in reversed time, dq = LA(do, v, k), dv = LA'(k, q, do),
    dk = LA'(v, do, q).
    """
    from sevenfold.ops.lightning.triton_launch import Scan, run_scan, states_between

    lengths = read_lengths(q.shape[0], q.shape[1], cu_seqlens)
    dinitial = _states(q, v, 0 if initial_state is None else len(lengths))
    state_in = None if initial_state is None else initial_state.contiguous()
    dstate = None if dfinal is None else dfinal.contiguous()
    dstate_out = None if initial_state is None else dinitial
    ahead = Scan(q, k, v, log_decay, scale, lengths, state_in)
    dq = run_scan(ahead._replace(q=do, k=v, v=k, transposed=True), states_between(ahead))
    back = Scan(k, q, do, log_decay, scale, lengths, dstate, dstate_out, reverse=True)
    between = states_between(back)
    dv = run_scan(back, between)
    dk = run_scan(back._replace(q=v, k=do, v=q, state_out=None, transposed=True), between)
    return dq, dk, dv, dinitial


@lightning_scan_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, scale, initial_state, cu_seqlens):
    N = 0 if initial_state is None else initial_state.shape[0]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _states(q, v, N)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_decay, scale, initial_state, cu_seqlens, with_final = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)
    ctx.scale, ctx.with_final = scale, with_final


def _backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dinitial = lightning_scan_backward(
        do,
        dfinal if ctx.with_final else None,
        q,
        k,
        v,
        log_decay,
        ctx.scale,
        initial_state,
        cu_seqlens,
    )
    dstate = None if initial_state is None else dinitial
    return dq, dk, dv, None, None, dstate, None, None


lightning_scan.register_autograd(_backward, setup_context=_save)


def _states(q: Tensor, v: Tensor, N: int) -> Tensor:
    return q.new_empty(N, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
