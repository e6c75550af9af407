"""Products with weights that are held in 8 bits: the linear layer and the mixture of experts."""

from sevenfold.ops.quantised.api import (
    check_fp8_device,
    default_fp8_impl,
    default_int8_impl,
    fp8_linear,
    int8_linear,
)
from sevenfold.ops.quantised.mixture import fp8_mixture, int8_mixture

__all__ = [
    "check_fp8_device",
    "default_fp8_impl",
    "default_int8_impl",
    "fp8_linear",
    "fp8_mixture",
    "int8_linear",
    "int8_mixture",
]
