"""The innermost loops that numba would not keep in registers, as LLVM instructions.

A tile of an fp32 product reaches 250 GFLOP/s on one core of an AMD EPYC with AVX-512, which is
what the core can do; the same loop in Python reaches 85, because numba keeps the sums in memory.
"""
# What numba compiles carries no annotations: its types are those of the arrays at the call.
# pyright: reportCallIssue=false

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

COLUMNS = 32
_FEATURES = get_host_cpu_features()
# Sums must fit the registers: 32 of 16 lanes, 16 of 8 lanes, or 32 of 4.
_LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4
ROWS = 8 if _LANES == 16 else 2
_VECTORS = COLUMNS // _LANES
SIDE = 8  # of a square that is turned at once
_GROUP = 64  # elements at once in a maximum: enough vectors to hide the latency

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_F32, _LANES)
_BYTES = ir.IntType(8).as_pointer()
_FUSED = ("contract",)  # one rounding for a product and its sum


@intrinsic
def add_tile(typingctx, c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, inner, keep):
    """C = A B for ROWS x COLUMNS of C; C += A B where keep is not 0.

    a, b, c are fp32 arrays; a matrix begins at element *_at, and its rows are *_row elements apart.
    A has `inner` columns, a_column elements apart; those of B and C are neighbours. Nothing is
    checked: an index outside an array is a fault.
    """
    arguments = (c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, inner, keep)
    return types.void(*arguments), _add_tile


def _add_tile(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, inner, keep = values
    arrays = zip((signature.args[i] for i in (0, 3, 7)), (c, a, b), (c_at, a_at, b_at), strict=True)
    c, a, b = (_begin(context, builder, *array) for array in arrays)
    with _sums(builder, c, c_row, keep) as sums:
        _multiply(builder, sums, a, a_row, a_column, b, b_row, inner)
    return context.get_dummy_value()


@intrinsic
def add_tiles(typingctx, c, c_at, c_row, a, a_at, a_row, a_part, b, b_at, inner, parts, keep):
    """C (+)= sum of A_p B_p over `parts`, as add_tile, with the sums in registers throughout.

    A's columns are neighbours, and a_part elements lie between parts; B's rows are COLUMNS long and
    lie one after another through all parts.
    """
    arguments = (c, c_at, c_row, a, a_at, a_row, a_part, b, b_at, inner, parts, keep)
    return types.void(*arguments), _add_tiles


def _add_tiles(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    c, c_at, c_row, a, a_at, a_row, a_part, b, b_at, inner, parts, keep = values
    arrays = zip((signature.args[i] for i in (0, 3, 7)), (c, a, b), (c_at, a_at, b_at), strict=True)
    c, a, b = (_begin(context, builder, *array) for array in arrays)
    one, columns = (ir.Constant(inner.type, n) for n in (1, COLUMNS))
    with _sums(builder, c, c_row, keep) as sums, cgutils.for_range(builder, parts) as part:
        left = builder.gep(a, [builder.mul(part.index, a_part)])
        right = builder.gep(b, [builder.mul(part.index, builder.mul(inner, columns))])
        _multiply(builder, sums, left, a_row, one, right, columns, inner)
    return context.get_dummy_value()


@contextmanager
def _sums(builder: Any, c: Any, c_row: Any, keep: Any) -> Iterator[list[Any]]:
    """The sums of a tile, from C or from 0, which go to C at the end."""
    places = [
        _shifted(builder, row, lane)
        for row in _rows(builder, c, c_row)
        for lane in range(0, COLUMNS, _LANES)
    ]
    sums = [cgutils.alloca_once(builder, _VECTOR) for _ in places]
    with builder.if_else(cgutils.is_not_null(builder, keep)) as (kept, fresh):
        with kept:
            for place, total in zip(places, sums, strict=True):
                builder.store(_load(builder, place), total)
        with fresh:
            for total in sums:
                builder.store(ir.Constant(_VECTOR, [0.0] * _LANES), total)
    yield sums
    for place, total in zip(places, sums, strict=True):
        builder.store(builder.load(total), _vector_at(builder, place), align=4)


def _multiply(
    builder: Any, sums: list[Any], a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, inner: Any
) -> None:
    a_rows = list(_rows(builder, a, a_row))
    with cgutils.for_range(builder, inner) as loop:
        b_place = builder.gep(b, [builder.mul(b_row, loop.index)])
        columns = [_load(builder, _shifted(builder, b_place, n)) for n in range(0, COLUMNS, _LANES)]
        column_at = builder.mul(a_column, loop.index)
        for i, a_place in enumerate(a_rows):
            element = _broadcast(builder, builder.load(builder.gep(a_place, [column_at])))
            for column, total in zip(columns, sums[i * _VECTORS :], strict=False):
                product = builder.fmul(element, column, flags=_FUSED)
                builder.store(builder.fadd(product, builder.load(total), flags=_FUSED), total)


@intrinsic
def copy_columns(typingctx, out, at, x, x_at):
    """COLUMNS neighbours of x from x_at to out from `at`; fp32 arrays, nothing is checked."""
    return types.void(out, at, x, x_at), partial(_copy, COLUMNS)


@intrinsic
def copy_rows(typingctx, out, at, x, x_at):
    """ROWS neighbours of x from x_at to out from `at`; fp32 arrays, nothing is checked."""
    return types.void(out, at, x, x_at), partial(_copy, ROWS)


def _copy(count: int, context: Any, builder: Any, signature: Any, values: Any) -> Any:
    out, at, x, x_at = values
    out = _begin(context, builder, signature.args[0], out, at)
    x = _begin(context, builder, signature.args[2], x, x_at)
    vector = ir.VectorType(_F32, count).as_pointer()
    elements = builder.load(builder.bitcast(x, vector), align=4)
    builder.store(elements, builder.bitcast(out, vector), align=4)
    return context.get_dummy_value()


@intrinsic
def fetch(typingctx, x, at):
    """Ask for the line of the cache that holds an array's element `at`, which may not exist."""
    return types.void(x, at), _fetch


def _fetch(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    place = builder.bitcast(_begin(context, builder, signature.args[0], *values), _BYTES)
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(prefetch, [place, _I32(0), _I32(2), _I32(1)])  # to read, often, data
    return context.get_dummy_value()


@intrinsic
def turn(typingctx, out, at, out_row, x, x_at, x_row):
    """out_ji = x_ij for SIDE x SIDE of fp32 arrays that begin at *at; nothing is checked.

    Rows are *_row elements apart. Elements of row i and of row i + SIDE / 2 alternate in a new
    row; log2(SIDE) such shuffles turn the matrix.
    """
    return types.void(out, at, out_row, x, x_at, x_row), _turn


def _turn(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    out, at, out_row, x, x_at, x_row = values
    out = _begin(context, builder, signature.args[0], out, at)
    x = _begin(context, builder, signature.args[3], x, x_at)
    vector = ir.VectorType(_F32, SIDE)
    places = [
        [builder.gep(p, [builder.mul(step, ir.Constant(step.type, i))]) for i in range(SIDE)]
        for p, step in ((x, x_row), (out, out_row))
    ]
    rows = [builder.load(builder.bitcast(p, vector.as_pointer()), align=4) for p in places[0]]
    halves = [
        ir.Constant(ir.VectorType(_I32, SIDE), [h + i // 2 + i % 2 * SIDE for i in range(SIDE)])
        for h in (0, SIDE // 2)
    ]
    for _ in range(SIDE.bit_length() - 1):
        pairs = [(rows[i], rows[i + SIDE // 2]) for i in range(SIDE // 2)]
        rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
    for row, place in zip(rows, places[1], strict=True):
        builder.store(row, builder.bitcast(place, vector.as_pointer()), align=4)
    return context.get_dummy_value()


@intrinsic
def max_of(typingctx, x, at, count, least):
    """The largest of `least` and `count` neighbours in an fp32 array from `at`; no NaN counts.

    count is a multiple of 64. Nothing is checked.
    """
    return types.float32(x, at, count, least), _max_of


def _max_of(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    x, at, count, least = values
    x = _begin(context, builder, signature.args[0], x, at)
    return _folded(builder, x, count, least, partial(_larger, builder))


@intrinsic
def sum_of(typingctx, x, at, count):
    """The sum of `count` neighbours in an fp32 array from `at`, in an order of its own.

    count is a multiple of 64. Nothing is checked.
    """
    return types.float32(x, at, count), _sum_of


def _sum_of(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    x, at, count = values
    x = _begin(context, builder, signature.args[0], x, at)
    return _folded(builder, x, count, ir.Constant(_F32, 0.0), builder.fadd)


def _folded(builder: Any, x: Any, count: Any, first: Any, fold: Any) -> Any:
    """`first` and `count` elements from x folded into one, _GROUP lanes at a time."""
    lanes = [
        cgutils.alloca_once_value(builder, _broadcast(builder, first))
        for _ in range(_GROUP // _LANES)
    ]
    step = ir.Constant(count.type, _GROUP)
    with cgutils.for_range(builder, builder.udiv(count, step)) as loop:
        group = builder.gep(x, [builder.mul(loop.index, step)])
        for i, lane in enumerate(lanes):
            new = _load(builder, _shifted(builder, group, i * _LANES))
            builder.store(fold(new, builder.load(lane)), lane)
    vector = builder.load(lanes[0])
    for lane in lanes[1:]:
        vector = fold(builder.load(lane), vector)
    folded = builder.extract_element(vector, ir.Constant(_I32, 0))
    for i in range(1, _LANES):
        folded = fold(builder.extract_element(vector, ir.Constant(_I32, i)), folded)
    return folded


def _begin(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Where an array's element `at` lies."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _rows(builder: Any, place: Any, distance: Any) -> Iterator[Any]:
    """Where ROWS rows begin."""
    for row in range(ROWS):
        yield builder.gep(place, [builder.mul(distance, ir.Constant(distance.type, row))])


def _shifted(builder: Any, place: Any, elements: int) -> Any:
    return builder.gep(place, [ir.Constant(_I32, elements)])


def _vector_at(builder: Any, place: Any) -> Any:
    return builder.bitcast(place, _VECTOR.as_pointer())


def _load(builder: Any, place: Any) -> Any:
    return builder.load(_vector_at(builder, place), align=4)


def _broadcast(builder: Any, element: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, element, ir.Constant(_I32, 0))
    lanes = ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES)
    return builder.shuffle_vector(first, undefined, lanes)


def _larger(builder: Any, new: Any, old: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", new, old), new, old)
