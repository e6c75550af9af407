"""Fewer bits for states and weights: int8 with a scale a row, fp16 with a scale a matrix."""

from sevenfold.ops.low_precision.fp16 import ScaledFp16, from_scaled_fp16, to_scaled_fp16
from sevenfold.ops.low_precision.int8 import Int8Rows, dequantise_rows, int8_linear, quantise_rows
from sevenfold.ops.low_precision.noise import Noise, noise_bits

__all__ = [
    "Int8Rows",
    "Noise",
    "ScaledFp16",
    "dequantise_rows",
    "from_scaled_fp16",
    "int8_linear",
    "noise_bits",
    "quantise_rows",
    "to_scaled_fp16",
]
