"""New tokens' keys and values into their pages: the Triton form."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.overlap import overlapping
from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_overlap import wait_for_last


@triton.jit
def _write_kernel(
    k, v, k_pages, v_pages, page, place, k_row, k_head, v_row, v_head, k_page, v_page, G,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One key head of one token."""
    wait_for_last(OVERLAPS)
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, iv = tl.arange(0, BD), tl.arange(0, BV)
    to, at = tl.load(page + row).to(tl.int64), tl.load(place + row).to(tl.int64) * G + g
    key = tl.load(k + row * k_row + g * k_head + i, i < D)
    value = tl.load(v + row * v_row + g * v_head + iv, iv < V)
    tl.store(k_pages + to * k_page + at * D + i, key, i < D)
    tl.store(v_pages + to * v_page + at * V + iv, value, iv < V)


def write(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page: Tensor, place: Tensor
) -> None:
    """Arguments as in the public operator."""
    if k.device.type != "cuda" and isinstance(_write_kernel, triton.JITFunction):
        raise UnsupportedError(f"impl 'triton' must run on a CUDA device, got {k.device}")
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    (tokens, G, D), V = k.shape, v.shape[-1]
    if tokens * G * D * V:
        _write_kernel[(tokens, G)](
            k, v, k_pages, v_pages, page, place, *k.stride()[:2], *v.stride()[:2],
            k_pages.stride(0), v_pages.stride(0), G,
            D=D, V=V, BD=next_power_of_2(D), BV=next_power_of_2(V), num_warps=1,
            **overlapping(k),
        )  # fmt: skip
