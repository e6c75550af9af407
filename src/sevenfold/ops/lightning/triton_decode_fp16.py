"""One token a sequence, the state in fp16 read and rounded in place: the Triton form."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.ops.lightning.triton_decode_common import (
    check_runnable,
    contiguous_widths,
    load_log_decay,
    power,
    tuning,
)
from sevenfold.ops.low_precision import Noise, ScaledFp16
from sevenfold.ops.low_precision.triton_round import (
    fp16_exponent,
    magnitude,
    noise,
    noise_seed,
    power_of_2,
    to_fp16,
)
from sevenfold.ops.row_launch import next_power_of_2


@triton.jit
def _advanced(
    codes, k, value, start, kept, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the state after the token, [ROWS, BV] fp32; kept multiplies the codes."""
    ik, iv = start + tl.arange(0, ROWS)[:, None], tl.arange(0, BV)[None, :]
    S = tl.load(codes + ik * V + iv, mask=(ik < K) & (iv < V), other=0.0).to(tl.float32)
    key = tl.load(k + ik, mask=ik < K, other=0.0).to(tl.float32)
    return kept * S + key * value[None, :]


@triton.jit
def _decode_kernel(
    q, k, v, log_decay, codes, head_scale, slots, key, position, layer, o, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, codes_slot, scale_slot, H,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program owns a whole head, whose largest element sets the scale of all.

    The rows go by twice: for the output and the largest element, and to be rounded. The second time
    they come from the cache.
    """
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    slot = tl.load(slots + b).to(tl.int64)
    ik, iv = tl.arange(0, ROWS)[:, None], tl.arange(0, BV)
    out = o + tl.program_id(0).to(tl.int64) * V + iv
    if slot < 0:
        tl.store(out, tl.zeros([BV], o.dtype.element_ty), mask=iv < V)
        return
    head_scale += slot * scale_slot + h
    codes += slot * codes_slot + h * K * V
    q += b * q_row + h * q_head
    k += b * k_row + h * k_head
    value = tl.load(v + b * v_row + h * v_head + iv, mask=iv < V, other=0.0).to(tl.float32)
    # A power of two: the product is the decay times the state, exactly as rounded as in fp32.
    kept = power(load_log_decay(log_decay, h), 1.0) * tl.load(head_scale)
    got, peaks = tl.zeros([ROWS, BV], tl.float32), tl.zeros([ROWS, BV], tl.int32)
    for start in range(0, K, ROWS):
        S = _advanced(codes, k, value, start, kept, K, V, BV, ROWS)
        query = tl.load(q + start + ik, mask=start + ik < K, other=0.0).to(tl.float32)
        got += query * S
        peaks = tl.maximum(peaks, magnitude(S))
    tl.store(out, (scale * tl.sum(got, axis=0)).to(o.dtype.element_ty), mask=iv < V)
    exponent = fp16_exponent(tl.max(peaks))
    seed = noise_seed(tl.load(key + b), tl.load(position + b), layer)
    for start in range(0, K, ROWS):
        S = _advanced(codes, k, value, start, kept, K, V, BV, ROWS)
        at = (start + ik) * V + iv[None, :]
        rounded = to_fp16(S, exponent, noise(seed, h * K * V + at), True)
        tl.store(codes + at, rounded, mask=(start + ik < K) & (iv < V)[None, :])
    tl.debug_barrier()  # the scale has been read by all before it is written
    tl.store(head_scale, power_of_2(exponent))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: ScaledFp16,
    slots: Tensor,
    noise: Noise,
    scale: float,
) -> Tensor:
    """Run one token of every sequence; arguments and result as in the public operator."""
    (B, H, K), V = q.shape, v.shape[-1]
    check_runnable(_decode_kernel, q, V)
    o = q.new_empty(B, H, V)
    q, k, v = (contiguous_widths(x) for x in (q, k, v))
    config = tuning("lightning_decode_fp16", B * H, K, q.device)
    if o.numel():
        _decode_kernel[(B * H,)](
            q, k, v, log_decay, *pool, slots, noise.key, noise.position, noise.layer, o, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *(x.stride(0) for x in pool),
            H, K=K, V=V, BV=next_power_of_2(V),
            ROWS=min(config["ROWS"], next_power_of_2(K)), num_warps=config["num_warps"],
        )  # fmt: skip
    return o
