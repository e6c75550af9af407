"""Zeros behind the last token of a row that counts, as a Triton kernel."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.row_launch import next_power_of_2
from sevenfold.ops.triton_launched import launched


@triton.jit
def _clear(x, row, head, x_token, x_head, x_column, D: tl.constexpr, BD: tl.constexpr):
    i = tl.arange(0, BD)
    at = row.to(tl.int64) * x_token + head * x_head + i * x_column
    tl.store(x + at, tl.zeros([BD], x.dtype.element_ty), i < D)


@launched
@triton.jit
def _clear_kernel(
    q, k, v, segments, num_segments, T, q_token, q_head, q_column, k_token, k_head, k_column,
    v_token, v_head, v_column,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One head of one token behind the last that counts, which is where the last segment ends."""
    n = tl.arange(0, BS)
    row = tl.max(tl.load(segments + n * 8 + 1, n < num_segments, other=0), 0) + tl.program_id(0)
    head = tl.program_id(1)
    if row < T:
        _clear(q, row, head, q_token, q_head, q_column, K, BK)
        _clear(k, row, head, k_token, k_head, k_column, K, BK)
        _clear(v, row, head, v_token, v_head, v_column, V, BV)


def clear_behind(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, num_tokens: int) -> None:
    """Set q, k [1, T, H, K] and v [1, T, H, V] to 0 in num_tokens tokens behind those that count.

    segments: as segments.Plan's.
    """
    _, T, H, K = q.shape
    V, I = v.shape[-1], len(segments)
    _clear_kernel[(num_tokens, H)](
        q, k, v, segments, I, T, *q.stride()[1:], *k.stride()[1:], *v.stride()[1:],
        K=K, V=V, BK=next_power_of_2(K), BV=next_power_of_2(V), BS=next_power_of_2(I),
        num_warps=1,
    )  # fmt: skip
