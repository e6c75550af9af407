"""Lightning attention: linear attention with a fixed decay per head."""

from sevenfold.ops.lightning.api import lightning_attention, lightning_attention_step
from sevenfold.ops.lightning.slopes import head_slopes, layer_log_decay

__all__ = ["head_slopes", "layer_log_decay", "lightning_attention", "lightning_attention_step"]
