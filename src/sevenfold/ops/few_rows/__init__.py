"""Half a layer of a few tokens on a CPU, in one call: decoding."""

from sevenfold.ops.few_rows.api import (
    MAX_ROWS,
    LightningWeights,
    Norm,
    Residual,
    dense_rows,
    expert_rows,
    lightning_rows,
    suits_few_rows,
)

__all__ = [
    "MAX_ROWS",
    "LightningWeights",
    "Norm",
    "Residual",
    "dense_rows",
    "expert_rows",
    "lightning_rows",
    "suits_few_rows",
]
