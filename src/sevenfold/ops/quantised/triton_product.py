"""The tile that all products with 8-bit weights share: codes read once, widened in registers.

The weight is the left operand, whose registers a tensor core reads directly; the rows of tokens are
the right one. With WK > 1 the warps share K: part p of a step's K goes to the p-th share, and the
shares are added in a fixed order at the end. So few output channels keep a multiprocessor busy, and
the same call gives the same bits.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def multiply(
    codes, n, x, at, in_m,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, BM] fp32: rows n of codes [., K] times the rows of x that begin at `at`, where in_m."""
    even: tl.constexpr = K % (WK * BK) == 0
    if WK == 1:
        acc = tl.zeros([BN, BM], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            w = _codes(codes + n[:, None] * K + k[None, :], k[None, :], K, even)
            xs = _rows(x + at[None, :] + k[:, None], in_m[None, :], k[:, None], K, even)
            acc = tl.dot(w.to(xs.dtype), xs, acc)
    else:
        shares = tl.zeros([WK, BN, BM], tl.float32)
        for start in tl.range(0, K, WK * BK, num_stages=STAGES):
            k = start + tl.arange(0, WK)[:, None] * BK + tl.arange(0, BK)[None, :]
            left, right = k[:, None, :], k[:, :, None]
            w = _codes(codes + n[None, :, None] * K + left, left, K, even)
            xs = _rows(x + at[None, None, :] + right, in_m[None, None, :], right, K, even)
            shares = tl.dot(w.to(xs.dtype), xs, shares)
        acc = tl.sum(shares, axis=0)
    return acc


@triton.jit
def _codes(at, k, K, even: tl.constexpr):
    if even:
        got = tl.load(at)
    else:
        got = tl.load(at, mask=k < K, other=0.0)
    return got


@triton.jit
def _rows(at, in_m, k, K, even: tl.constexpr):
    """Rows of nobody are zero, and are not read."""
    if even:
        got = tl.load(at, mask=in_m, other=0.0)
    else:
        got = tl.load(at, mask=in_m & (k < K), other=0.0)
    return got
