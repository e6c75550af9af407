"""What is done to each element of fp32 arrays, a whole vector at once, as LLVM instructions.

LLVM keeps numba's loops to 256 bits on processors by Intel, and fuses no product with its sum.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sevenfold.ops.vector import (
    I32,
    LANES,
    VECTOR,
    begin,
    broadcast,
    constant,
    fused,
    load,
    shifted,
    store,
)

_GROUP = 64  # elements at once in a maximum or a sum: enough vectors to hide the latency
_WHOLE = ir.VectorType(I32, LANES)
_LEAST, _MOST = -87.3, 88.3  # whose exponentials are normal numbers
_LOG2_E = 1.44269504088896341
_LN_2 = (0.693359375, -2.12194440e-4)  # in two parts
_ROUNDING = 1.5 * 2**23  # a sum with it holds the nearest whole number in its last bits
# Of compiled.exp32, and 1 and 1, from the highest power down.
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
    1.0,
    1.0,
)


@intrinsic
def exp_of(typingctx, x, at, count, less):
    """x_i = exp(x_i - less) for `count` neighbours in an fp32 array from `at`; returns their sum.

    As compiled.exp32. count is a multiple of 64. Nothing is checked.
    """
    return types.float32(x, at, count, less), _exp_of


def _exp_of(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    x, at, count, less = values
    x, less = begin(context, builder, signature.args[0], x, at), broadcast(builder, less)

    def exp(place: Any) -> Any:
        made = _exp(builder, builder.fsub(load(builder, place), less))
        store(builder, made, place)
        return made

    return _folded(builder, x, count, constant(0.0), exp, builder.fadd)


@intrinsic
def max_of(typingctx, x, at, count, least):
    """The largest of `least` and `count` neighbours in an fp32 array from `at`; no NaN counts.

    count is a multiple of 64. Nothing is checked.
    """
    return types.float32(x, at, count, least), _max_of


def _max_of(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    x, at, count, least = values
    x, least = begin(context, builder, signature.args[0], x, at), broadcast(builder, least)
    return _folded(builder, x, count, least, partial(load, builder), partial(_larger, builder))


def _larger(builder: Any, new: Any, old: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", new, old), new, old)


def _folded(
    builder: Any, x: Any, count: Any, first: Any, read: Callable[[Any], Any], fold: Any
) -> Any:
    """The vector `first` and what is read of `count` elements from x, folded into one element."""
    totals = [cgutils.alloca_once_value(builder, first) for _ in range(_GROUP // LANES)]
    step = ir.Constant(count.type, _GROUP)
    with cgutils.for_range(builder, builder.udiv(count, step)) as loop:
        group = builder.gep(x, [builder.mul(loop.index, step)])
        for i, total in enumerate(totals):
            new = read(shifted(builder, group, i * LANES))
            builder.store(fold(new, builder.load(total)), total)
    vector = builder.load(totals[0])
    for total in totals[1:]:
        vector = fold(builder.load(total), vector)
    return _across(builder, vector, fold)


def _across(builder: Any, vector: Any, fold: Any) -> Any:
    """The lanes of a vector folded into one element."""
    half = LANES // 2
    while half:
        lanes = ir.Constant(_WHOLE, [(i + half) % LANES for i in range(LANES)])
        vector = fold(builder.shuffle_vector(vector, vector, lanes), vector)
        half //= 2
    return builder.extract_element(vector, ir.Constant(I32, 0))


@intrinsic
def silu_times(typingctx, out, at, x, gate_at, up_at, count):
    """out_i = silu(gate_i) up_i for `count` elements of fp32 arrays, gate and up both in x.

    They begin at *_at. count is a multiple of 16. Nothing is checked.
    """
    return types.void(out, at, x, gate_at, up_at, count), _silu_times


def _silu_times(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    out, at, x, gate_at, up_at, count = values
    out = begin(context, builder, signature.args[0], out, at)
    gate, up = (begin(context, builder, signature.args[2], x, i) for i in (gate_at, up_at))
    step = ir.Constant(count.type, LANES)
    with cgutils.for_range(builder, builder.udiv(count, step)) as loop:
        i = builder.mul(loop.index, step)
        g, u = (load(builder, builder.gep(place, [i])) for place in (gate, up))
        below = builder.fadd(constant(1.0), _exp(builder, builder.fneg(g)))
        store(builder, builder.fmul(builder.fdiv(g, below), u), builder.gep(out, [i]))
    return context.get_dummy_value()


@intrinsic
def silu_times_grad(typingctx, dx, x, gate_at, up_at, dy, dy_at, share, hidden):
    """The gradient of share * silu(gate_i) up_i, a row of fp32 arrays; returns the share's.

    x and dx hold gate and up, which begin at *_at and follow one another; dy begins at dy_at, and
    so does hidden, which receives what the gradient is of. The row is a multiple of 16 long.
    Nothing is checked.
    """
    return types.float32(dx, x, gate_at, up_at, dy, dy_at, share, hidden), _silu_times_grad


def _silu_times_grad(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    dx, x, gate_at, up_at, dy, dy_at, share, hidden = values
    kinds, fmul, fadd = signature.args, builder.fmul, builder.fadd
    gate, up = (begin(context, builder, kinds[1], x, at) for at in (gate_at, up_at))
    dgate, dup = (begin(context, builder, kinds[0], dx, at) for at in (gate_at, up_at))
    dy = begin(context, builder, kinds[4], dy, dy_at)
    hidden = begin(context, builder, kinds[7], hidden, dy_at)
    share, one = broadcast(builder, share), constant(1.0)
    total = cgutils.alloca_once_value(builder, constant(0.0))
    step = ir.Constant(up_at.type, LANES)
    count = builder.udiv(builder.sub(up_at, gate_at), step)
    with cgutils.for_range(builder, count) as loop:
        i = builder.mul(loop.index, step)
        g, u, d = (load(builder, builder.gep(place, [i])) for place in (gate, up, dy))
        sigmoid = builder.fdiv(one, fadd(one, _exp(builder, builder.fneg(g))))
        silu = fmul(g, sigmoid)
        made = fmul(silu, u)
        builder.store(fused(builder, made, d, builder.load(total)), total)
        d = fmul(d, share)
        slope = fused(builder, silu, builder.fsub(one, sigmoid), sigmoid)
        for value, place in (
            (fmul(made, share), hidden),
            (fmul(fmul(d, u), slope), dgate),
            (fmul(d, silu), dup),
        ):
            store(builder, value, builder.gep(place, [i]))
    return _across(builder, builder.load(total), builder.fadd)


def _exp(builder: Any, x: Any) -> Any:
    """exp of a vector, in the steps of compiled.exp32; NaN stays NaN."""
    for bound, side in ((_LEAST, "<"), (_MOST, ">")):
        beyond = builder.fcmp_ordered(side, x, constant(bound))
        x = builder.select(beyond, constant(bound), x)
    shifted_n = fused(builder, x, constant(_LOG2_E), constant(_ROUNDING))
    n = builder.fsub(shifted_n, constant(_ROUNDING))
    r = x
    for part in _LN_2:
        r = fused(builder, n, constant(-part), r)
    p = constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = fused(builder, p, r, constant(coefficient))
    # The bits of the rounding sum but its last ones leave on the left.
    n_bits = builder.shl(builder.bitcast(shifted_n, _WHOLE), ir.Constant(_WHOLE, [23] * LANES))
    bits = builder.add(n_bits, ir.Constant(_WHOLE, [127 << 23] * LANES))
    return builder.fmul(p, builder.bitcast(bits, VECTOR))
