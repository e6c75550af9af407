"""Joins two parts of softmax attention in one pass over them, as a Triton kernel."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.attention.join import Part
from sevenfold.ops.row_launch import cdiv, next_power_of_2

_ROWS = 32  # 32 values of each part a thread at width 128


@triton.jit(do_not_specialize=["T"])
def _join_kernel(
    some, more, out, some_lse, more_lse,
    some_token, some_head, more_token, more_head, out_token, out_head, some_row, more_row, T,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of one head; the first log-sum-exp becomes that of both."""
    t, h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    i, t = tl.arange(0, BD), t.to(tl.int64)
    rows, inside = t < T, (t < T)[:, None] & (tl.arange(0, BD) < D)[None, :]
    lse_at = some_lse + h * some_row + t
    a = tl.load(lse_at, rows, other=0.0)
    b = tl.load(more_lse + h * more_row + t, rows, other=0.0)
    top = tl.maximum(a, b)
    weigh, add = tl.exp(a - top), tl.exp(b - top)
    total = weigh + add
    first = tl.load(some + t[:, None] * some_token + h * some_head + i[None, :], inside, other=0.0)
    second = tl.load(more + t[:, None] * more_token + h * more_head + i[None, :], inside, other=0.0)
    summed = first.to(tl.float32) * (weigh / total)[:, None]
    summed += second.to(tl.float32) * (add / total)[:, None]
    out_at = out + t[:, None] * out_token + h * out_head + i[None, :]
    tl.store(out_at, summed.to(out.dtype.element_ty), inside)
    tl.store(lse_at, top + tl.log(total), rows)


def join(some: Part, more: Part, out: Tensor) -> Part:
    """Arguments and result as join_eager's; some.lse is overwritten."""
    T, H, D = out.shape
    _join_kernel[(cdiv(T, _ROWS), H)](
        some.o, more.o, out, some.lse, more.lse,
        *some.o.stride()[:2], *more.o.stride()[:2], *out.stride()[:2],
        some.lse.stride(0), more.lse.stride(0), T,
        D=D, BD=next_power_of_2(D), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return Part(out, some.lse)
