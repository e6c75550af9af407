"""Rotary positions of a few rows' queries and keys, in place, in one kernel."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.row_launch import next_power_of_2

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
    q, k, cos, sin, H, G,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, GP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0), tl.arange(0, BH)[None, :]
    c = tl.load(cos + row * HALF + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + row * HALF + i, mask=i < HALF, other=0.0)
    _turn(q + row * H * D, c, s, H, D, HALF, HP, BH)
    _turn(k + row * G * D, c, s, G, D, HALF, GP, BH)


def rotate_rows(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn q [M, H, D] and k [M, G, D] in place by angles whose cos and sin are [M, r / 2] fp32.

        y_i = x_i cos - x_{i + r/2} sin,  y_{i + r/2} = x_{i + r/2} cos + x_i sin,  i < r/2
    """
    (M, H, D), G, half = q.shape, k.shape[1], cos.shape[1]
    _rotate_kernel[(M,)](
        q, k, cos, sin, H, G, D=D, HALF=half, HP=next_power_of_2(H), GP=next_power_of_2(G),
        BH=next_power_of_2(half), num_warps=_WARPS,
    )  # fmt: skip
