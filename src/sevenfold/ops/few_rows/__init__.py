"""Half a layer of a few tokens: decoding, in one call on a CPU and in a few kernels on a GPU."""

from sevenfold.ops.few_rows.api import (
    MAX_ROWS,
    DenseRows,
    ExpertRows,
    LightningRows,
    suits_few_rows,
)
from sevenfold.ops.few_rows.device import (
    DeviceExperts,
    dense_on_device,
    experts_on_device,
    feed_lightning,
    feed_softmax,
    join_lightning,
    join_softmax,
    logits_on_device,
    rotate_on_device,
    suits_device_rotation,
    suits_device_router,
    suits_device_rows,
    suits_device_weights,
)
from sevenfold.ops.few_rows.types import LightningWeights, Norm, Residual

__all__ = [
    "MAX_ROWS",
    "DenseRows",
    "DeviceExperts",
    "ExpertRows",
    "LightningRows",
    "LightningWeights",
    "Norm",
    "Residual",
    "dense_on_device",
    "experts_on_device",
    "feed_lightning",
    "feed_softmax",
    "join_lightning",
    "join_softmax",
    "logits_on_device",
    "rotate_on_device",
    "suits_device_rotation",
    "suits_device_router",
    "suits_device_rows",
    "suits_device_weights",
    "suits_few_rows",
]
