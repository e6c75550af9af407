"""Rotary positions of queries and keys, in place, in one kernel."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last


@triton.jit
def _rotate_kernel(
    q, k, positions, frequency, H, G,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One head of one row: sines and cosines take longer than their products."""
    wait_for_last(OVERLAPS)
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BH)
    at = q + (row * H + h) * D + i
    if h >= H:
        at = k + (row * G + h - H) * D + i
    inside = i < HALF
    first, second = tl.load(at, mask=inside), tl.load(at + HALF, mask=inside)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequency + i, mask=inside)
    cos, sin = tl.cos(angle), tl.sin(angle)
    one, two = first.to(tl.float32), second.to(tl.float32)
    tl.store(at, (one * cos - two * sin).to(first.dtype), mask=inside)
    tl.store(at + HALF, (two * cos + one * sin).to(first.dtype), mask=inside)


def rotate_rows(q: Tensor, k: Tensor, positions: Tensor, frequency: Tensor) -> None:
    """Turn q [M, H, D] and k [M, G, D], contiguous, in place; arguments as rotate_on_device."""
    (M, H, D), G, half = q.shape, k.shape[1], len(frequency)
    _rotate_kernel[(M, H + G)](
        q, k, positions, frequency, H, G, D=D, HALF=half, BH=next_power_of_2(half),
        num_warps=1, **overlapping(q),
    )  # fmt: skip
