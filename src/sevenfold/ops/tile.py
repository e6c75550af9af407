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
from numba.core import cgutils, types
from numba.extending import intrinsic

from sevenfold.ops.vector import (
    F32,
    FUSED,
    I32,
    LANES,
    VECTOR,
    begin,
    broadcast,
    load,
    shifted,
    vector_at,
)

COLUMNS = 32
# Sums must fit the registers: 32 of 16 lanes, 16 of 8 lanes, or 32 of 4.
ROWS = 8 if LANES == 16 else 2
_VECTORS = COLUMNS // LANES
SIDE = 8  # of a square that is turned at once
_BYTES = ir.IntType(8).as_pointer()


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
    c, a, b = (begin(context, builder, *array) for array in arrays)
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
    c, a, b = (begin(context, builder, *array) for array in arrays)
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
        shifted(builder, row, lane)
        for row in _rows(builder, c, c_row)
        for lane in range(0, COLUMNS, LANES)
    ]
    sums = [cgutils.alloca_once(builder, VECTOR) for _ in places]
    with builder.if_else(cgutils.is_not_null(builder, keep)) as (kept, fresh):
        with kept:
            for place, total in zip(places, sums, strict=True):
                builder.store(load(builder, place), total)
        with fresh:
            for total in sums:
                builder.store(ir.Constant(VECTOR, [0.0] * LANES), total)
    yield sums
    for place, total in zip(places, sums, strict=True):
        builder.store(builder.load(total), vector_at(builder, place), align=4)


def _multiply(
    builder: Any, sums: list[Any], a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, inner: Any
) -> None:
    a_rows = list(_rows(builder, a, a_row))
    with cgutils.for_range(builder, inner) as loop:
        b_place = builder.gep(b, [builder.mul(b_row, loop.index)])
        columns = [load(builder, shifted(builder, b_place, n)) for n in range(0, COLUMNS, LANES)]
        column_at = builder.mul(a_column, loop.index)
        for i, a_place in enumerate(a_rows):
            element = broadcast(builder, builder.load(builder.gep(a_place, [column_at])))
            for column, total in zip(columns, sums[i * _VECTORS :], strict=False):
                product = builder.fmul(element, column, flags=FUSED)
                builder.store(builder.fadd(product, builder.load(total), flags=FUSED), total)


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
    out = begin(context, builder, signature.args[0], out, at)
    x = begin(context, builder, signature.args[2], x, x_at)
    vector = ir.VectorType(F32, count).as_pointer()
    elements = builder.load(builder.bitcast(x, vector), align=4)
    builder.store(elements, builder.bitcast(out, vector), align=4)
    return context.get_dummy_value()


@intrinsic
def fetch(typingctx, x, at):
    """Ask for the line of the cache that holds an array's element `at`, which may not exist."""
    return types.void(x, at), _fetch


def _fetch(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    place = builder.bitcast(begin(context, builder, signature.args[0], *values), _BYTES)
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(prefetch, [place, I32(0), I32(2), I32(1)])  # to read, often, data
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
    out = begin(context, builder, signature.args[0], out, at)
    x = begin(context, builder, signature.args[3], x, x_at)
    vector = ir.VectorType(F32, SIDE)
    places = [
        [builder.gep(p, [builder.mul(step, ir.Constant(step.type, i))]) for i in range(SIDE)]
        for p, step in ((x, x_row), (out, out_row))
    ]
    rows = [builder.load(builder.bitcast(p, vector.as_pointer()), align=4) for p in places[0]]
    halves = [
        ir.Constant(ir.VectorType(I32, SIDE), [h + i // 2 + i % 2 * SIDE for i in range(SIDE)])
        for h in (0, SIDE // 2)
    ]
    for _ in range(SIDE.bit_length() - 1):
        pairs = [(rows[i], rows[i + SIDE // 2]) for i in range(SIDE // 2)]
        rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
    for row, place in zip(rows, places[1], strict=True):
        builder.store(row, builder.bitcast(place, vector.as_pointer()), align=4)
    return context.get_dummy_value()


def _rows(builder: Any, place: Any, distance: Any) -> Iterator[Any]:
    """Where ROWS rows begin."""
    for row in range(ROWS):
        yield builder.gep(place, [builder.mul(distance, ir.Constant(distance.type, row))])
