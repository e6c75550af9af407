"""RMSNorm, alone, with MiniMax's output gate, and with the residual that feeds it."""

from sevenfold.ops.rms_norm.api import (
    default_rms_norm_impl,
    gated_rms_norm,
    post_rms_norm,
    residual_rms_norm,
    rms_norm,
)

__all__ = [
    "default_rms_norm_impl",
    "gated_rms_norm",
    "post_rms_norm",
    "residual_rms_norm",
    "rms_norm",
]
