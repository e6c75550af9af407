"""The tile that all products of a few rows share: a weight is read once, past a norm on its rows.

    got = W (x o w o g)      squares = sum over k of x_k^2

so that r * got, with r = 1 / sqrt(squares / K + eps), is W RMSNorm(x) o g: the norm's statistic is
taken while the weight streams, and nothing waits for it. x o w o g is rounded once to x's dtype, as
a norm of its own would round. fp16 could overflow there, so it goes past a norm of its own.

The weight is the left operand, whose rows are many; the rows of tokens are the right one. With
WK > 1 the warps share K: part p of a step's K goes to the p-th share, and shares are added in a
fixed order at the end, so that the same call gives the same bits.
"""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def multiply(
    w, n, x, at, in_m, norm, gate,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """got [BN, BM] fp32 and squares [BM].

    Rows n of w [., K] times the rows of x, and of gate, that begin at `at`, where in_m. Without a
    norm (None) x is taken as it is, and squares are zero.
    """
    even: tl.constexpr = K % (WK * BK) == 0
    if WK == 1:
        got = tl.zeros([BN, BM], tl.float32)
        squares = tl.zeros([BK, BM], tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            left = _load(w + n[:, None] * K + k[None, :], None, k[None, :], K, even)
            xs = _load(x + at[None, :] + k[:, None], in_m[None, :], k[:, None], K, even)
            if norm is not None:
                wide = xs.to(tl.float32)
                squares += wide * wide
                wide *= _load(norm + k, None, k, K, even).to(tl.float32)[:, None]
                if gate is not None:
                    gates = _load(
                        gate + at[None, :] + k[:, None], in_m[None, :], k[:, None], K, even
                    )
                    wide *= gates.to(tl.float32)
                xs = wide.to(xs.dtype)
            got = tl.dot(left, xs, got, input_precision="ieee")
        squares = tl.sum(squares, axis=0)
    else:
        shares = tl.zeros([WK, BN, BM], tl.float32)
        squares = tl.zeros([WK, BK, BM], tl.float32)
        for start in tl.range(0, K, WK * BK, num_stages=STAGES):
            k = start + tl.arange(0, WK)[:, None] * BK + tl.arange(0, BK)[None, :]
            along, down = k[:, None, :], k[:, :, None]
            left = _load(w + n[None, :, None] * K + along, None, along, K, even)
            xs = _load(x + at[None, None, :] + down, in_m[None, None, :], down, K, even)
            if norm is not None:
                wide = xs.to(tl.float32)
                squares += wide * wide
                wide *= _load(norm + k, None, k, K, even).to(tl.float32)[:, :, None]
                if gate is not None:
                    gates = _load(
                        gate + at[None, None, :] + down, in_m[None, None, :], down, K, even
                    )
                    wide *= gates.to(tl.float32)
                xs = wide.to(xs.dtype)
            shares = tl.dot(left, xs, shares, input_precision="ieee")
        got = tl.sum(shares, axis=0)
        squares = tl.sum(tl.sum(squares, axis=0), axis=0)
    return got, squares


@triton.jit
def root(squares, K: tl.constexpr, eps):
    """r of RMSNorm, of sums over K."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))


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
