"""What a kernel does that may begin before the one in front of it has ended: fetch, then wait."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of a launch's weights: what an L2 of 50 MB holds beside those of its neighbours.
FETCHED_BYTES = tl.constexpr(32 << 20)


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    """Let the next kernel's programs start as soon as all of this one's have."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr):
    """Wait until all kernels before have ended, and see what they wrote."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def fetch(start, count, OVERLAPS: tl.constexpr):
    """Ask for `count` elements from the pointer `start` on, at most 2^31 bytes, to be in the L2.

    One thread asks for all of them. They are whole steps of 16 bytes in memory; a last part of a
    step is left out.
    """
    if OVERLAPS:
        size: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
        bytes_asked = tl.cast(count * size, tl.int32) & -16
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            setp.gt.and.s32 first, $2, 0, first;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [start.to(tl.int64) & -16, bytes_asked],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def is_fetched(place, count, weight):
    """Whether the place-th tile of `count` elements lies among a launch's first FETCHED_BYTES.

    Programs beyond start when the first have ended: they have nothing to wait for.
    """
    size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    return place.to(tl.int64) * count * size < FETCHED_BYTES
