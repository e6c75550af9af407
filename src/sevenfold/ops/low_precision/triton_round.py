"""How kernels round: the statements of fp16.py, int8.py and noise.py, with the same bits."""

# pyright reads a kernel as the Python function that it is not.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

# Adding and taking it away rounds to a whole number, ties to even.
_TO_WHOLE = tl.constexpr(1.5 * 2.0**23)
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def magnitude(x):
    """The bits of |x|, int32: in the order of |x|, and a NaN's above an infinity's."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_seed(key, position, layer):
    """noise_bits' seed of one sequence, uint32; key and position int64."""
    seed = _mix(_mix(key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
    return _mix(_mix(seed ^ position.to(tl.uint32)) ^ layer)


@triton.jit
def noise(seed, element):
    """noise_bits' bits of an element of a sequence's state, uint32."""
    return _mix(seed ^ _mix(element.to(tl.uint32)))


@triton.jit
def fp16_exponent(peak):
    """The exponent of to_scaled_fp16's scale, of a head whose largest magnitude has these bits."""
    # A fraction that rounds to the next power of two in 11 bits carries into the exponent.
    exponent = tl.maximum(((peak + 0x1000) >> 23) - (126 + 15), -126)
    exponent = tl.where(peak == 0, -15, exponent)
    return tl.where(peak < _INFINITE, exponent, 0)


@triton.jit
def power_of_2(exponent):
    """2^exponent, fp32; -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_fp16(x, exponent, bits, ROUND: tl.constexpr):
    """x / 2^exponent in fp16: up or down by random bits with ROUND, else to nearest."""
    scaled = x * power_of_2(-exponent)
    if ROUND:
        raised = scaled.to(tl.int32, bitcast=True) + (bits & 0x1FFF).to(tl.int32)
        rounded = (raised & -0x2000).to(tl.float32, bitcast=True)
        scaled = tl.where(magnitude(scaled) < _INFINITE, rounded, scaled)
    return scaled.to(tl.float16)


@triton.jit
def int8_scale(peak):
    """quantise_rows' scale of rows whose largest magnitudes have these bits."""
    exact = tl.div_rn(peak.to(tl.float32, bitcast=True), 127.0)
    rounded = (exact.to(tl.int32, bitcast=True) + 0x7F) & -0x80
    return tl.where(magnitude(exact) < _INFINITE, rounded.to(tl.float32, bitcast=True), exact)


@triton.jit
def to_int8(x, scale):
    """x / scale in int8; 0 where the scale is no number, which makes NaN of it again."""
    usable = (scale > 0) & (magnitude(scale) < _INFINITE)
    codes = tl.div_rn(x, tl.where(usable, scale, 1.0)) + _TO_WHOLE - _TO_WHOLE
    return tl.where(usable, codes, 0.0).to(tl.int8)
