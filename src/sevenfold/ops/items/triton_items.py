"""Items copied and cleared by one Triton kernel: the first programs copy, the others clear."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.row_launch import cdiv

_BLOCK, _WARPS = 4096, 8  # 16 words a thread


@triton.jit
def _copy_and_clear_kernel(
    words, copied, places, num_copied, cleared, num_copying, num_clearing, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if pid < num_copying:
        i += pid * BLOCK
        there = i < num_copied
        read = tl.load(words + tl.load(places) + i, mask=there)
        tl.store(copied + i, read, mask=there)
    else:
        item = (pid - num_copying) // num_clearing
        at = tl.load(places + 1 + item)
        if at != 0:
            i += (pid - num_copying - item * num_clearing) * BLOCK
            tl.store(words + at + i, tl.zeros([BLOCK], tl.int64), mask=i < cleared)


def copy_and_clear(words: Tensor, copied: Tensor, places: Tensor, cleared: int) -> None:
    """Arguments as the public operator's."""
    num_copying, num_clearing = cdiv(len(copied), _BLOCK), cdiv(cleared, _BLOCK)
    num_programs = num_copying + (len(places) - 1) * num_clearing
    if num_programs:
        _copy_and_clear_kernel[(num_programs,)](
            words, copied, places, len(copied), cleared, num_copying, num_clearing,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
