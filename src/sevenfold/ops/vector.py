"""Vectors of fp32 as LLVM instructions: their width, and how arrays are read by them."""

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features

_FEATURES = get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4
F32, I32 = ir.FloatType(), ir.IntType(32)
VECTOR = ir.VectorType(F32, LANES)
FUSED = ("contract",)  # one rounding for a product and its sum


def begin(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Where an array's element `at` lies."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def shifted(builder: Any, place: Any, elements: int) -> Any:
    """The place some elements further on."""
    return builder.gep(place, [ir.Constant(I32, elements)])


def vector_at(builder: Any, place: Any) -> Any:
    """A place as that of a vector."""
    return builder.bitcast(place, VECTOR.as_pointer())


def load(builder: Any, place: Any) -> Any:
    """The vector at a place."""
    return builder.load(vector_at(builder, place), align=4)


def store(builder: Any, vector: Any, place: Any) -> None:
    """Write a vector to a place."""
    builder.store(vector, vector_at(builder, place), align=4)


def broadcast(builder: Any, element: Any) -> Any:
    """A vector whose lanes are all one element."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, element, ir.Constant(I32, 0))
    lanes = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, lanes)


def constant(value: float) -> Any:
    """A vector whose lanes are all one number."""
    return ir.Constant(VECTOR, [value] * LANES)


def fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once where the processor can."""
    return builder.fadd(builder.fmul(x, y, flags=FUSED), z, flags=FUSED)
