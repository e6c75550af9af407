"""Pending tokens folded into a head's state in int8, whose rows get new scales."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from sevenfold.ops.lightning.triton_decode_common import fold, power, weigh
from sevenfold.ops.low_precision.triton_round import int8_scale, magnitude, to_int8


@triton.jit
def _folded(
    codes, step, ring_v, source, start, P, decay, weighted,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BF columns of the state after P pending tokens, [BK, BF] fp32."""
    ik, iv = tl.arange(0, BK)[:, None], start + tl.arange(0, BF)[None, :]
    inside = (ik < K) & (iv < V)
    S = tl.load(codes + ik * V + iv, mask=inside, other=0.0).to(tl.float32) * step[:, None]
    live = (tl.arange(0, BR) < P)[:, None]
    values = tl.load(ring_v + source[:, None] * V + iv, mask=live & (iv < V), other=0.0)
    return fold(S, decay, weighted, values)


@triton.jit
def fold_int8(
    codes, scales, ring_v, source, keys, P, rate,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Replace a head's codes [K, V] and scales [K] by those P tokens later.

    The columns go by twice: a row's scale must be known before its first code is written. Codes are
    a quarter of fp32's bytes, and the second time they come from the cache.
    """
    ik, iv = tl.arange(0, BK), tl.arange(0, BF)[None, :]
    weighted, decay = weigh(keys, P, rate, BR), power(rate, P.to(tl.float32))
    step = tl.load(scales + ik, mask=ik < K, other=0.0)
    peaks = tl.zeros([BK], tl.int32)
    for start in range(0, V, BF):
        S = _folded(codes, step, ring_v, source, start, P, decay, weighted, K, V, BK, BF, BR)
        peaks = tl.maximum(peaks, tl.max(magnitude(S), axis=1))
    new = int8_scale(peaks)
    tl.debug_barrier()  # all have read the old scales and codes before one is written
    for start in range(0, V, BF):
        S = _folded(codes, step, ring_v, source, start, P, decay, weighted, K, V, BK, BF, BR)
        inside = (ik < K)[:, None] & (start + iv < V)
        at = codes + ik[:, None] * V + start + iv
        tl.store(at, to_int8(S, new[:, None]), mask=inside)
    tl.store(scales + ik, new, mask=ik < K)
