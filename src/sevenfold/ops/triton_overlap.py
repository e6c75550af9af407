"""How a kernel begins that is launched while the one in front of it ends: it waits."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr):
    """Wait until all kernels before have ended, and see what they wrote."""
    if OVERLAPS:
        gdc_wait()
