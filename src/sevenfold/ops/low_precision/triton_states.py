"""States in fewer bits written and read where they lie: the Triton form."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.ops.low_precision.states import WIDEST
from sevenfold.ops.low_precision.triton_round import (
    fp16_exponent,
    int8_scale,
    magnitude,
    noise,
    noise_seed,
    power_of_2,
    to_fp16,
    to_int8,
)
from sevenfold.ops.row_launch import cdiv, next_power_of_2

# Rows of a head that a program has in its registers at once: 32 elements a thread for 128 columns.
_ROWS, _WARPS = 32, 4


@triton.jit
def _head(heads, j):
    """The j-th head's index among all."""
    head = j
    if heads is not None:
        head = tl.load(heads + j).to(tl.int32)
    return head


@triton.jit
def _encode_rows_kernel(
    states, slots, codes, scale, heads, into, h, states_slot, codes_slot, scale_slot,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """int8 with a scale, or another dtype as it is: a program has some rows of one head."""
    n, j = tl.program_id(0) // h, tl.program_id(0) % h
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    v = tl.arange(0, BV)[None, :]
    inside, at = (k < K) & (v < V), k * V + v
    source = tl.load(slots + n).to(tl.int64) * states_slot + _head(heads, j) * K * V
    target = tl.load(into + n).to(tl.int64)
    S = tl.load(states + source + at, mask=inside, other=0.0)
    out = codes + target * codes_slot + j * K * V + at
    if scale is None:
        tl.store(out, S.to(codes.dtype.element_ty), mask=inside)
    else:
        step = int8_scale(tl.max(magnitude(S), axis=1, keep_dims=True))
        tl.store(out, to_int8(S, step), mask=inside)
        tl.store(scale + target * scale_slot + j * K + k, step, mask=k < K)


@triton.jit
def _encode_fp16_kernel(
    states, slots, codes, scale, heads, into, key, position, layer, h,
    states_slot, codes_slot, scale_slot,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program has one head, and reads it twice: for its largest element, and to round it."""
    n, j = tl.program_id(0) // h, tl.program_id(0) % h
    head = _head(heads, j)
    ik, v = tl.arange(0, ROWS)[:, None], tl.arange(0, BV)[None, :]
    states += tl.load(slots + n).to(tl.int64) * states_slot + head * K * V
    target = tl.load(into + n).to(tl.int64)
    codes += target * codes_slot + j * K * V
    peaks = tl.zeros([ROWS, BV], tl.int32)
    for start in range(0, K, ROWS):
        k = start + ik
        S = tl.load(states + k * V + v, mask=(k < K) & (v < V), other=0.0)
        peaks = tl.maximum(peaks, magnitude(S))
    exponent = fp16_exponent(tl.max(peaks))
    if key is not None:
        seed = noise_seed(tl.load(key + n), tl.load(position + n), layer)
    for start in range(0, K, ROWS):
        k = start + ik
        at = k * V + v
        S = tl.load(states + at, mask=(k < K) & (v < V), other=0.0)
        if key is None:
            rounded = to_fp16(S, exponent, 0, False)
        else:
            rounded = to_fp16(S, exponent, noise(seed, head * K * V + at), True)
        tl.store(codes + at, rounded, mask=(k < K) & (v < V))
    tl.store(scale + target * scale_slot + j, power_of_2(exponent))


@triton.jit
def _decode_kernel(
    codes, scale, heads, slots, states, into, h, codes_slot, scale_slot, states_slot,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    n, j = tl.program_id(0) // h, tl.program_id(0) % h
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    v = tl.arange(0, BV)[None, :]
    inside, at = (k < K) & (v < V), k * V + v
    source = tl.load(slots + n).to(tl.int64)
    S = tl.load(codes + source * codes_slot + j * K * V + at, mask=inside, other=0.0)
    S = S.to(tl.float32)
    if scale is not None:
        if BY_ROW:
            S *= tl.load(scale + source * scale_slot + j * K + k, mask=k < K, other=0.0)
        else:
            S *= tl.load(scale + source * scale_slot + j)
    target = tl.load(into + n).to(tl.int64) * states_slot + _head(heads, j) * K * V
    tl.store(states + target + at, S, mask=inside)


def encode(
    states: Tensor,
    slots: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    heads: Tensor | None,
    into: Tensor,
    key: Tensor | None,
    position: Tensor | None,
    layer: int,
) -> None:
    """Round states into codes and scale; arguments as the public operator's, taken apart."""
    _, h, K, V = codes.shape
    _check_runnable(states)
    strides = (states.stride(0), codes.stride(0), 0 if scale is None else scale.stride(0))
    common = (states, slots, codes, scale, heads, into)
    if not len(slots) * h:
        return
    if scale is not None and scale.dim() == 2:
        _encode_fp16_kernel[(len(slots) * h,)](
            *common, key, position, layer, h, *strides, **_constants(K, V)
        )
    else:
        grid = (len(slots) * h, cdiv(K, _ROWS))
        _encode_rows_kernel[grid](*common, h, *strides, **_constants(K, V))


def decode(
    codes: Tensor,
    scale: Tensor | None,
    heads: Tensor | None,
    slots: Tensor,
    states: Tensor,
    into: Tensor,
) -> None:
    """Write what codes and scale hold into states; arguments as the public operator's."""
    _, h, K, V = codes.shape
    _check_runnable(states)
    strides = (codes.stride(0), 0 if scale is None else scale.stride(0), states.stride(0))
    if len(slots) * h:
        _decode_kernel[(len(slots) * h, cdiv(K, _ROWS))](
            codes, scale, heads, slots, states, into, h, *strides,
            BY_ROW=scale is not None and scale.dim() == 3, **_constants(K, V),
        )  # fmt: skip


def _check_runnable(states: Tensor) -> None:
    """Raise UnsupportedError unless the kernels can run on the states.

    Triton's interpreter, which stands in for a compiled kernel in tests, runs on a CPU too.
    """
    if states.device.type != "cuda" and isinstance(_decode_kernel, triton.JITFunction):
        raise UnsupportedError(f"impl 'triton' must run on a CUDA device, got {states.device}")
    if max(states.shape[-2:]) > WIDEST:
        raise UnsupportedError(
            f"impl 'triton' must have heads of at most {WIDEST}, got {max(states.shape[-2:])}"
        )


def _constants(K: int, V: int) -> dict[str, int]:
    return {"K": K, "V": V, "ROWS": _ROWS, "BV": next_power_of_2(V), "num_warps": _WARPS}
