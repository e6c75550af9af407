"""Launches the scan kernels: cuts, layouts, configurations. Imports Triton."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportReturnType=false

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sevenfold.ops.lightning.horizons import HORIZONS
from sevenfold.ops.lightning.segments import Plan, Room, Stop, plan_segments
from sevenfold.ops.lightning.triton_hopper import hopper_scan_kernel
from sevenfold.ops.lightning.triton_padding import clear_behind
from sevenfold.ops.lightning.triton_scan import chain_kernel, scan_kernel
from sevenfold.ops.lightning.triton_short import run_short, suits_short
from sevenfold.ops.row_launch import cdiv, next_power_of_2, num_sms
from sevenfold.ops.triton_launched import BulkCopies
from sevenfold.ops.tuning import best_config

_HOPPER_WIDTH = 256  # at most, and a multiple of 8: bulk copies step by 16 bytes
_HOPPER_PART = 128  # columns of a value tile, and of the parts of keys
_HOPPER_CHUNK = 64
# States between segments take at most so many bytes a token and head, however short segments are.
_STATE_BYTES_PER_TOKEN = 16
_CHAIN_BLOCK = 1024

# A captured graph reads its plan's tables at every replay: those are never given back.
_plans_of_graphs: dict[int, Plan] = {}


class Scan(NamedTuple):
    """A scan: its inputs, and where it leaves states.

    q, k: [B, T, H, K]. v: [B, T, H, V]. log_decay: [H] fp32.
    lengths: tokens of each sequence; they sum to B * T, or to less with `plan`, as it says.
    state_in, state_out: [N, H, K, V] fp32 contiguous, or None.
    pool, stops: states to keep on the way; the pool's slots may lie apart.
    reverse: from the last token to the first.
    transposed: the states' matrices lie in memory as [V, K].
    plan: cuts and stops that are known already, in the place of those of lengths and stops.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    scale: float
    lengths: tuple[int, ...]
    state_in: Tensor | None = None
    state_out: Tensor | None = None
    pool: Tensor | None = None
    stops: tuple[Stop, ...] = ()
    reverse: bool = False
    transposed: bool = False
    plan: Plan | None = None

    @property
    def on_hopper(self) -> bool:
        """Whether the kernel for Hopper GPUs serves this scan."""
        q, widths = self.q, (self.q.shape[3], self.v.shape[3])
        fits = q.itemsize == 2 and all(w <= _HOPPER_WIDTH and w % 8 == 0 for w in widths)
        return fits and q.is_cuda and _is_hopper(q.device)


def run_scan(scan: Scan, between: Tensor | None = None) -> Tensor:
    """Return o [B, T, H, V] of a scan; writes the states that it names.

    between: states_between(scan), where it is known already.
    """
    o = torch.empty(scan.v.shape, dtype=scan.v.dtype, device=scan.v.device)
    if o.shape[2] * o.shape[3] * scan.q.shape[3] * len(scan.lengths) == 0:
        return o
    if o.numel() == 0:
        return _keep_states(scan, o)
    plan = plan_scan(scan)
    if between is None and plan.num_slots:
        between = states_between(scan)
    _launch(scan, plan, plan.segments, o, between, output=True)
    return o


def run_padded(scan: Scan, states: Tensor, slots: Tensor) -> Tensor:
    """run_scan of a row whose last tokens do not count, as scan.plan says; may write those to 0.

    The state after the last that counts goes to slots [1] of states [S, H, K, V].
    """
    plan = plan_scan(scan)
    if suits_short(scan.q, plan) and scan.v.shape[3]:
        tokens = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in scan[:3])
        left, kept = (states, slots), (_or(scan.pool, states), plan)
        return run_short(tokens, scan.log_decay, scan.scale, scan.state_in, left, kept)
    if scan.on_hopper:
        # Bulk copies bring whole chunks, and a product with what is no number is none.
        clear_behind(scan.q, scan.k, scan.v, plan.segments, _HOPPER_CHUNK)
    final = states.new_empty(1, *states.shape[1:])
    o = run_scan(scan._replace(state_out=final))
    states[slots] = final
    return o


def states_between(scan: Scan) -> Tensor | None:
    """What each segment but a sequence's first meets, [slots, H, K, V]; None without cuts.

    Pieces of the segments give what they add; sums then run along each sequence, into the slot of
    each segment's last piece.
    """
    plan = plan_scan(scan)
    if plan.num_slots == 0:
        return None
    (H, K), V = scan.q.shape[2:], scan.v.shape[3]
    between = scan.log_decay.new_empty(plan.num_slots, H, K, V)
    _launch(scan, plan, plan.pieces, scan.k, between, output=False)
    grid = (len(plan.chains), H, cdiv(K * V, _CHAIN_BLOCK))
    chain_kernel[grid](
        _or(scan.state_in, between),
        between,
        scan.log_decay,
        HORIZONS[scan.q.dtype],
        plan.chains,
        CELLS=K * V,
        BLOCK=_CHAIN_BLOCK,
        HAS_IN=scan.state_in is not None,
        OVERLAPS=scan.on_hopper,
        **_overlapping(scan.on_hopper),
    )
    return between


def plan_scan(scan: Scan) -> Plan:
    """The cuts of a scan; they depend on its lengths, its widths and the device alone."""
    if scan.plan is not None:
        return scan.plan
    device = scan.q.device
    plan = plan_segments(scan.lengths, plan_room(scan), scan.stops, scan.reverse, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _plans_of_graphs[id(plan)] = plan
    return plan


def plan_room(scan: Scan) -> Room:
    """What the cuts of a scan must suit; of its tokens it reads lengths alone."""
    H, device = scan.q.shape[2], scan.q.device
    if scan.on_hopper:
        programs, chunk = num_sms(device), _HOPPER_CHUNK
        tiles, own_tiles = cdiv(_widest(scan), _HOPPER_PART), _value_tiles(scan)
    else:
        config = _config(scan)
        programs = num_sms(device) * config["programs_per_sm"]
        tiles = own_tiles = cdiv(_widest(scan), config["value_columns"])
        chunk = config["chunk_tokens"]
    cells = scan.q.shape[3] * scan.v.shape[3]
    most_slots = _STATE_BYTES_PER_TOKEN * sum(scan.lengths) // (4 * cells)
    # Cut alike for a scan and for its transpose, which share the states between segments.
    return Room(H * tiles, H * own_tiles, programs, chunk, most_slots)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _keep_states(scan: Scan, o: Tensor) -> Tensor:
    """Without a token, states stay as they were."""
    if scan.state_out is not None:
        scan.state_out.zero_() if scan.state_in is None else scan.state_out.copy_(scan.state_in)
    return o


def _launch(
    scan: Scan, plan: Plan, table: Tensor, o: Tensor, between: Tensor | None, *, output: bool
) -> None:
    launch = _launch_hopper if scan.on_hopper else _launch_any
    K, V = scan.q.shape[3], scan.v.shape[3]
    swapped = scan.transposed and output
    flags = {
        "HAS_IN": scan.state_in is not None and output,
        "HAS_OUT": scan.state_out is not None and output,
        "HAS_STOPS": (scan.plan is not None or bool(scan.stops)) and output,
        "HAS_BETWEEN": between is not None,
        "OUTPUT": output,
        "REVERSE": scan.reverse,
    }
    states = [scan.state_in, between, scan.state_out, scan.pool]
    pointers = [_or(state, scan.log_decay) for state in states]
    pool_slot = pointers[3].stride(0)
    steps = (1, K) if swapped else (V, 1)
    launch(scan, (plan, table), o, (*pointers, pool_slot, *steps), flags)


def _launch_any(
    scan: Scan, work: tuple[Plan, Tensor], o: Tensor, states: tuple, flags: dict
) -> None:
    K, V, config = scan.q.shape[3], scan.v.shape[3], _config(scan)
    plan, table = work
    tile = _tile(scan, config)
    rows = [_rows(x) for x in (scan.q, scan.k, scan.v, o)]
    scan_kernel[(len(table) * cdiv(V, tile), scan.q.shape[2])](
        *rows,
        scan.log_decay,
        float(scan.scale),
        HORIZONS[scan.q.dtype],
        *states[:5],
        table,
        plan.stops,
        *(stride for x in rows for stride in x.stride()[:2]),
        *states[5:],
        K=K,
        V=V,
        BK=_padded(K),
        BV=tile,
        C=config["chunk_tokens"],
        **flags,
        num_warps=config["warps"],
        num_stages=config["stages"],
    )


def _launch_hopper(
    scan: Scan, work: tuple[Plan, Tensor], o: Tensor, states: tuple, flags: dict
) -> None:
    H, K, V = scan.q.shape[2], scan.q.shape[3], scan.v.shape[3]
    plan, table = work
    parts = (_part(K), _part(K), _hopper_tile(K, V))
    read = [_bulk_copies(x, part) for x, part in zip(scan[:3], parts, strict=True)]
    # Its loads wait for nothing: tokens that were copied just now may not be in memory yet.
    is_copied = any(x.base.data_ptr() != y.data_ptr() for x, y in zip(read, scan[:3], strict=True))
    written = _bulk_copies(o, parts[2]) if flags["OUTPUT"] else read[2]
    heads = H * _value_tiles(scan)
    works = len(table) * heads
    most = num_sms(o.device)
    deal = plan.deal if flags["OUTPUT"] else None
    programs = min(works, most) if deal is None else most
    if flags["OUTPUT"] and deal is None:
        programs = _num_programs(works, heads, most)
    hopper_scan_kernel[(programs,)](
        *read,
        written,
        written.base,
        scan.log_decay,
        float(scan.scale),
        HORIZONS[scan.q.dtype],
        *states[:5],
        table,
        _or(deal, table),
        plan.stops,
        works,
        H,
        *written.strides[:2],
        *states[5:],
        **_hopper_sizes(K, V, flags["OUTPUT"]),
        **flags,
        IS_EVEN=deal is None,
        **_overlapping(flags["OUTPUT"] and flags["HAS_BETWEEN"] and not is_copied),
    )


@cache
def _hopper_sizes(K: int, V: int, output: bool) -> dict[str, int]:
    """Constants of the kernel for Hopper GPUs."""
    is_wide, tile = K > _HOPPER_PART, _hopper_tile(K, V)
    return {
        "K": K,
        "V": V,
        "BK": 2 * _HOPPER_PART if is_wide else _part(K),
        "BV": tile,
        "C": _HOPPER_CHUNK,
        "TILES": cdiv(V, _HOPPER_PART),
        "STAGES": _num_stages(is_wide, output),
        "num_warps": tile // 16,
    }


def _hopper_tile(K: int, V: int) -> int:
    """Columns of a tile of values."""
    return _HOPPER_PART if K > _HOPPER_PART else _part(V)


def _overlapping(wanted: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the kernel in front of it has ended."""
    return {"launch_pdl": True} if wanted else {}


def _num_programs(works: int, heads: int, most: int) -> int:
    """Programs of a persistent kernel: all, or so many that each one stays with its head."""
    aligned = most // heads * heads
    if aligned > 0 and cdiv(works, aligned) == cdiv(works, most):
        return min(works, aligned)
    return min(works, most)


def _config(scan: Scan) -> dict[str, int]:
    q = scan.q
    name = torch.cuda.get_device_name(q.device) if q.is_cuda else "default"
    return best_config("lightning_scan", f"{_padded(_widest(scan))} {8 * q.itemsize} bits", name)


def _widest(scan: Scan) -> int:
    return max(scan.q.shape[3], scan.v.shape[3])


def _tile(scan: Scan, config: dict[str, int]) -> int:
    return min(config["value_columns"], _padded(scan.v.shape[3]))


def _padded(width: int) -> int:
    return max(16, next_power_of_2(width))


def _rows(x: Tensor) -> Tensor:
    """[B, T, H, D] as [B * T, H, D] whose last stride is 1, copying only where it must."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _bulk_copies(x: Tensor, part: int) -> BulkCopies:
    """[B, T, H, D] as rows [B * T, H, D] for bulk copies of parts of D; copies where it must."""
    B, T, H, D = x.shape
    block = (_HOPPER_CHUNK, 1, part)
    if x.data_ptr() % 16 == 0 and x.is_contiguous():  # D is a multiple of 8 elements of 2 bytes
        return BulkCopies(x, (B * T, H, D), (H * D, D, 1), block)
    rows = _copyable_rows(x)
    return BulkCopies(rows, tuple(rows.shape), rows.stride(), block)


def _copyable_rows(x: Tensor) -> Tensor:
    """As _rows, with what bulk tensor copies need: 16-byte steps from token to token and head."""
    rows = _rows(x)
    steps = [rows.data_ptr()] + [stride * rows.itemsize for stride in rows.stride()[:2]]
    fits = all(step % 16 == 0 for step in steps) and rows.stride(1) > 0
    return rows if fits else rows.contiguous()


def _part(width: int) -> int:
    """Columns of a head, or of a part of it, as the kernel for Hopper GPUs holds them."""
    return 64 if width <= 64 else _HOPPER_PART


def _value_tiles(scan: Scan) -> int:
    """Programs of a segment and head on Hopper."""
    return cdiv(scan.v.shape[3], _HOPPER_PART)


def _num_stages(is_wide: bool, output: bool) -> int:
    """Chunks in shared memory, of as many tensors as are read: what there is room for."""
    if is_wide:
        return 2 if output else 4
    return 3 if output else 5


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
