"""Rotary positions of queries and keys, in place, in one kernel."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last

_WARPS = 4


@triton.jit
def _turn(x, cos, sin, H, D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, BH: tl.constexpr):
    h, i = tl.arange(0, HP)[:, None], tl.arange(0, BH)[None, :]
    inside = (h < H) & (i < HALF)
    at = x + h * D + i
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    one, two = first.to(tl.float32), second.to(tl.float32)
    tl.store(at, (one * cos - two * sin).to(first.dtype), mask=inside)
    tl.store(at + HALF, (two * cos + one * sin).to(first.dtype), mask=inside)


@triton.jit
def _rotate_kernel(
    q, k, positions, frequency, H, G,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_last(OVERLAPS)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BH)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequency + i, i < HALF, 0.0)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    _turn(q + row * H * D, cos, sin, H, D, HALF, HP, BH)
    _turn(k + row * G * D, cos, sin, G, D, HALF, GP, BH)


def rotate_rows(q: Tensor, k: Tensor, positions: Tensor, frequency: Tensor) -> None:
    """Turn q [M, H, D] and k [M, G, D], contiguous, in place; arguments as rotate_on_device."""
    (M, H, D), G, half = q.shape, k.shape[1], len(frequency)
    _rotate_kernel[(M,)](
        q, k, positions, frequency, H, G, D=D, HALF=half, HP=next_power_of_2(H),
        GP=next_power_of_2(G), BH=next_power_of_2(half), num_warps=_WARPS, **overlapping(q),
    )  # fmt: skip
