"""Launches the scan kernels: layouts, segments, configuration. Imports Triton."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sevenfold.ops.lightning.segments import MIN_SEGMENT_TOKENS, Segments, Stop, plan_segments
from sevenfold.ops.lightning.triton_hopper import hopper_scan_kernel
from sevenfold.ops.lightning.triton_scan import scan_kernel
from sevenfold.ops.tuning import best_config

_HOPPER_WIDTHS = (64, 128)
_HOPPER_CHUNK = 64


class Scan(NamedTuple):
    """What a scan reads besides q, k and v, and where it leaves states.

    state_in, state_out: [N, H, K, V] fp32 contiguous or None; [N, H, V, K] where transposed.
    """

    log_decay: Tensor
    scale: float
    lengths: tuple[int, ...]
    state_in: Tensor | None = None
    state_out: Tensor | None = None
    pool: Tensor | None = None
    stops: tuple[Stop, ...] = ()
    reverse: bool = False
    transposed: bool = False


def run_scan(q: Tensor, k: Tensor, v: Tensor, scan: Scan) -> Tensor:
    """Return o [B, T, H, V] of one scan; writes the states that `scan` names."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if q.shape[2] * q.shape[3] * v.shape[3] * len(scan.lengths) == 0:
        return o
    if takes_hopper_kernel(q, v) and len(q) * q.shape[1] > 0:
        run_hopper(q, k, v, o, scan)
    else:
        run_any(q, k, v, o, scan)
    return o


def run_any(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scan: Scan) -> None:
    """Write o by the kernel that takes any width and dtype."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    key = f"K{_padded(K)} {8 * q.itemsize} bits"
    config = best_config("lightning_scan", key, device_name(q))
    BV = min(config["value_columns"], _padded(V))
    tiles = triton.cdiv(V, BV)
    segments = plan(scan, H * tiles, config["programs_per_sm"], q.device)
    tensors = [_rows(x) for x in (q, k, v)] + [o.flatten(0, 1)]
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    grid = (len(segments.table) * tiles, H)
    scan_kernel[grid](
        *tensors,
        scan.log_decay,
        float(scan.scale),
        _or(scan.state_in, scan.log_decay),
        _or(scan.state_out, scan.log_decay),
        _or(scan.pool, scan.log_decay),
        segments.table,
        segments.stops,
        *strides,
        *((1, K) if scan.transposed else (V, 1)),
        K=K,
        V=V,
        BK=_padded(K),
        BV=BV,
        C=config["chunk_tokens"],
        REVERSE=scan.reverse,
        HAS_IN=scan.state_in is not None,
        HAS_OUT=scan.state_out is not None,
        HAS_STOPS=bool(scan.stops),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )


def takes_hopper_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the Hopper kernel serves such widths and dtype on this device."""
    fits = q.itemsize == 2 and q.shape[3] in _HOPPER_WIDTHS and v.shape[3] in _HOPPER_WIDTHS
    return fits and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) == (9, 0)


def run_hopper(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scan: Scan, stages: int = 3, slots: int = 0) -> None:
    """Write o by the kernel for Hopper GPUs."""
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    segments = plan(scan, H, 1, q.device) if not slots else plan_segments(scan.lengths, max(1,slots//H), MIN_SEGMENT_TOKENS, scan.stops, q.device)
    rows = [_copyable_rows(x) for x in (q, k, v)] + [o.flatten(0, 1)]
    descriptors = [_descriptor(x) for x in rows]
    works = len(segments.table) * H
    hopper_scan_kernel[(min(works, num_sms(q.device)),)](
        *descriptors,
        o,
        scan.log_decay,
        float(scan.scale),
        _or(scan.state_in, scan.log_decay),
        _or(scan.state_out, scan.log_decay),
        _or(scan.pool, scan.log_decay),
        segments.table,
        segments.stops,
        works,
        H,
        *(x.stride(1) for x in rows[:3]),
        *rows[3].stride()[:2],
        *((1, K) if scan.transposed else (V, 1)),
        K=K,
        V=V,
        C=_HOPPER_CHUNK,
        REVERSE=scan.reverse,
        HAS_IN=scan.state_in is not None,
        HAS_OUT=scan.state_out is not None,
        HAS_STOPS=bool(scan.stops),
        STAGES=stages,
        num_warps=V // 16,
    )


def _copyable_rows(x: Tensor) -> Tensor:
    """As _rows, and laid out as bulk tensor copies need it: 16-byte steps from head to head."""
    rows = _rows(x)
    steps = [rows.data_ptr()] + [stride * rows.itemsize for stride in rows.stride()[:2]]
    return rows if all(step % 16 == 0 for step in steps) and rows.stride(1) > 0 else rows.contiguous()


def _descriptor(rows: Tensor) -> TensorDescriptor:
    tokens, H, D = rows.shape
    block = [_HOPPER_CHUNK, D]
    dtype = gl.bfloat16 if rows.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    columns = (H - 1) * rows.stride(1) + D
    return TensorDescriptor(rows, [tokens, columns], [rows.stride(0), 1], block, layout)


def plan(scan: Scan, programs: int, programs_per_sm: int, device: torch.device) -> Segments:
    """Segments that keep the device busy, where each is the given number of programs."""
    slots = programs_per_sm * num_sms(device)
    return plan_segments(
        scan.lengths, max(1, slots // programs), MIN_SEGMENT_TOKENS, scan.stops, device
    )


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_name(x: Tensor) -> str:
    """The name by which tuning tables know the device."""
    return torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else "default"


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _rows(x: Tensor) -> Tensor:
    """[B, T, H, D] as [B * T, H, D] whose last stride is 1, copying only where it must."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
