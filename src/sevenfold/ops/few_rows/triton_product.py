"""The tile that all products of a few rows share: a weight is read once.

The weight is the left operand, whose rows are many; the rows of tokens are the right one. With
WK > 1 the warps share K: part p of a step's K goes to the p-th share, and shares are added in a
fixed order at the end, so that the same call gives the same bits.

One row alone needs no matrix unit, for which it would be padded to 16: every thread multiplies what
it loads, and a program has BN x BK numbers of the weight on their way at once. Where that is all of
K, a program can take the row's norm itself. A barrier stands between the weight's loads and the
row's: without one the compiler puts some of them off until others have come, to save registers.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def multiply(
    w, n, x, at, in_m,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """[BN, BM] fp32: rows n of w [., K] times the rows of x that begin at `at`, where in_m."""
    even: tl.constexpr = K % (WK * BK) == 0
    if BM == 1:
        products = tl.zeros([BN, BK], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)[None, :]
            left = _load(w + n[:, None] * K + k, None, k, K, even)
            tl.debug_barrier()
            row = _load(x + at[:, None] + k, in_m[:, None], k, K, even).to(tl.float32)
            products += left.to(tl.float32) * row
        got = tl.sum(products, axis=1, keep_dims=True)
    elif WK == 1:
        got = tl.zeros([BN, BM], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            left = _load(w + n[:, None] * K + k[None, :], None, k[None, :], K, even)
            xs = _load(x + at[None, :] + k[:, None], in_m[None, :], k[:, None], K, even)
            got = _add_product(left, xs, got)
    else:
        shares = tl.zeros([WK, BN, BM], tl.float32)
        for start in tl.range(0, K, WK * BK, num_stages=STAGES):
            k = start + tl.arange(0, WK)[:, None] * BK + tl.arange(0, BK)[None, :]
            along, down = k[:, None, :], k[:, :, None]
            left = _load(w + n[None, :, None] * K + along, None, along, K, even)
            xs = _load(x + at[None, None, :] + down, in_m[None, None, :], down, K, even)
            shares = _add_product(left, xs, shares)
        got = tl.sum(shares, axis=0)
    return got


@triton.jit
def held_rows(w, n, K: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] rows n of w [., K], all of each: BK >= K."""
    k = tl.arange(0, BK)[None, :]
    return _load(w + n[:, None] * K + k, None, k, K, K == BK)


@triton.jit
def held_row(x, K: tl.constexpr, BK: tl.constexpr):
    """[1, BK] fp32: all of one row x [K]."""
    k = tl.arange(0, BK)[None, :]
    return _load(x + k, None, k, K, K == BK).to(tl.float32)


@triton.jit
def norm_factor(row, eps, K: tl.constexpr):
    """What RMSNorm multiplies a row [1, BK] of K numbers by."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(row * row, axis=1, keep_dims=True) / K + eps))


@triton.jit
def times_row(rows, row):
    """[BN, 1] fp32: rows [BN, BK] times a row [1, BK]."""
    return tl.sum(rows.to(tl.float32) * row.to(tl.float32), axis=1, keep_dims=True)


@triton.jit
def _add_product(left, right, total):
    """total + left right; in fp32 by sums of BK products, as one sum of all rounds at its size."""
    if left.dtype == tl.float32:
        # Written as an addition it would be taken into the product.
        part = tl.dot(left, right, input_precision="ieee")
        total = tl.fma(part, tl.full(part.shape, 1.0, tl.float32), total)
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _load(at, used, k, K, even: tl.constexpr):
    """Rows of nobody are zero, and are not read."""
    if even:
        if used is None:
            got = tl.load(at)
        else:
            got = tl.load(at, mask=used, other=0.0)
    else:
        if used is None:
            got = tl.load(at, mask=k < K, other=0.0)
        else:
            got = tl.load(at, mask=used & (k < K), other=0.0)
    return got
