"""Operators: functions of tensors, each with one meaning and one or more implementations."""

from sevenfold.ops.attention import attention, attention_cached
from sevenfold.ops.cross_entropy import IGNORED_LABEL, linear_cross_entropy
from sevenfold.ops.experts import Dispatch, combine, gather_rows, grouped_linear, plan_dispatch
from sevenfold.ops.lightning import (
    head_slopes,
    layer_log_decay,
    lightning_attention,
    lightning_attention_step,
)
from sevenfold.ops.linear import head_logits, linear
from sevenfold.ops.precision import autocast, full_precision
from sevenfold.ops.rms_norm import rms_norm
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.types import Impl, OpResult

__all__ = [
    "IGNORED_LABEL",
    "Dispatch",
    "Impl",
    "OpResult",
    "attention",
    "attention_cached",
    "autocast",
    "combine",
    "full_precision",
    "gather_rows",
    "grouped_linear",
    "head_logits",
    "head_slopes",
    "layer_log_decay",
    "lightning_attention",
    "lightning_attention_step",
    "linear",
    "linear_cross_entropy",
    "plan_dispatch",
    "rms_norm",
    "swiglu",
]
