"""Operators: functions of tensors, each with one meaning and one or more implementations."""

from sevenfold.ops.attention import (
    attention,
    attention_cached,
    attention_paged,
    attention_paged_tree,
)
from sevenfold.ops.cross_entropy import IGNORED_LABEL, linear_cross_entropy
from sevenfold.ops.experts import (
    Dispatch,
    combine,
    gather_rows,
    grouped_linear,
    mixture,
    plan_dispatch,
    route,
    router_logits,
)
from sevenfold.ops.few_rows import (
    DenseRows,
    ExpertRows,
    LightningRows,
    LightningWeights,
    Norm,
    Residual,
    suits_few_rows,
)
from sevenfold.ops.lightning import (
    MAX_DRAFT_TOKENS,
    ReplayPool,
    Snapshots,
    Stop,
    head_slopes,
    layer_log_decay,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_decode,
    lightning_attention_prefill,
    lightning_attention_replay,
    lightning_attention_step,
    lightning_attention_verify,
)
from sevenfold.ops.linear import head_logits, linear
from sevenfold.ops.precision import autocast, full_precision
from sevenfold.ops.rms_norm import gated_rms_norm, residual_rms_norm, rms_norm
from sevenfold.ops.silu_qkv import silu_qkv
from sevenfold.ops.swiglu import swiglu
from sevenfold.ops.types import Impl, OpResult

__all__ = [
    "IGNORED_LABEL",
    "MAX_DRAFT_TOKENS",
    "DenseRows",
    "Dispatch",
    "ExpertRows",
    "Impl",
    "LightningRows",
    "LightningWeights",
    "Norm",
    "OpResult",
    "ReplayPool",
    "Residual",
    "Snapshots",
    "Stop",
    "attention",
    "attention_cached",
    "attention_paged",
    "attention_paged_tree",
    "autocast",
    "combine",
    "full_precision",
    "gated_rms_norm",
    "gather_rows",
    "grouped_linear",
    "head_logits",
    "head_slopes",
    "layer_log_decay",
    "lightning_attention",
    "lightning_attention_commit",
    "lightning_attention_decode",
    "lightning_attention_prefill",
    "lightning_attention_replay",
    "lightning_attention_step",
    "lightning_attention_verify",
    "linear",
    "linear_cross_entropy",
    "mixture",
    "plan_dispatch",
    "residual_rms_norm",
    "rms_norm",
    "route",
    "router_logits",
    "silu_qkv",
    "suits_few_rows",
    "swiglu",
]
