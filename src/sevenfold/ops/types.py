"""Types that every operator shares."""

from enum import StrEnum
from typing import NamedTuple

from torch import Tensor


class Impl(StrEnum):
    """How an operator is computed; its meaning never depends on this."""

    REFERENCE = "reference"
    EAGER = "eager"
    ONEDNN = "onednn"
    GROUPED_MM = "grouped_mm"
    SCALED_MM = "scaled_mm"
    TRITON = "triton"
    NUMBA = "numba"
    FLASH = "flash"
    CUDNN = "cudnn"


class OpResult(NamedTuple):
    """Output of a recurrent operator; final_state is None unless asked for."""

    o: Tensor
    final_state: Tensor | None
