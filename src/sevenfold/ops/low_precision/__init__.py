"""Fewer bits for states and weights: int8 and fp8 with a scale a row, fp16 with one a matrix."""

from sevenfold.ops.low_precision.fp8 import FP8, LARGEST_FP8, Fp8Rows, quantise_rows_fp8
from sevenfold.ops.low_precision.fp16 import ScaledFp16, from_scaled_fp16, to_scaled_fp16
from sevenfold.ops.low_precision.int8 import Int8Rows, dequantise_rows, quantise_rows
from sevenfold.ops.low_precision.noise import Noise, noise_bits
from sevenfold.ops.low_precision.states import (
    EncodedHeads,
    decode_states,
    encode_states,
)

__all__ = [
    "FP8",
    "LARGEST_FP8",
    "EncodedHeads",
    "Fp8Rows",
    "Int8Rows",
    "Noise",
    "ScaledFp16",
    "decode_states",
    "dequantise_rows",
    "encode_states",
    "from_scaled_fp16",
    "noise_bits",
    "quantise_rows",
    "quantise_rows_fp8",
    "to_scaled_fp16",
]
