"""Half a layer of a few tokens on a CPU, in one call: decoding."""

from sevenfold.ops.few_rows.api import (
    MAX_ROWS,
    DenseRows,
    ExpertRows,
    LightningRows,
    suits_few_rows,
)
from sevenfold.ops.few_rows.types import LightningWeights, Norm, Residual

__all__ = [
    "MAX_ROWS",
    "DenseRows",
    "ExpertRows",
    "LightningRows",
    "LightningWeights",
    "Norm",
    "Residual",
    "suits_few_rows",
]
