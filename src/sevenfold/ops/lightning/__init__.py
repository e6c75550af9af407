"""Lightning attention: linear attention with a fixed decay per head."""

from sevenfold.ops.lightning.api import (
    lightning_attention,
    lightning_attention_prefill,
    lightning_attention_step,
)
from sevenfold.ops.lightning.borders import Span, lightning_add_read, lightning_added
from sevenfold.ops.lightning.decode import lightning_attention_decode
from sevenfold.ops.lightning.decode_fp16 import lightning_attention_decode_fp16
from sevenfold.ops.lightning.padded import (
    PaddedSnapshots,
    lightning_attention_padded,
    padded_cuts,
)
from sevenfold.ops.lightning.padded_cuts import PaddedCuts
from sevenfold.ops.lightning.replay import ReplayPool, lightning_attention_replay
from sevenfold.ops.lightning.replay_int8 import Int8ReplayPool, lightning_attention_replay_int8
from sevenfold.ops.lightning.segments import Stop
from sevenfold.ops.lightning.slopes import head_slopes, layer_log_decay
from sevenfold.ops.lightning.snapshots import Snapshots
from sevenfold.ops.lightning.verify import (
    MAX_DRAFT_TOKENS,
    lightning_attention_commit,
    lightning_attention_verify,
)
from sevenfold.ops.lightning.verify_int8 import (
    lightning_attention_commit_int8,
    lightning_attention_verify_int8,
)

__all__ = [
    "MAX_DRAFT_TOKENS",
    "Int8ReplayPool",
    "PaddedCuts",
    "PaddedSnapshots",
    "ReplayPool",
    "Snapshots",
    "Span",
    "Stop",
    "head_slopes",
    "layer_log_decay",
    "lightning_add_read",
    "lightning_added",
    "lightning_attention",
    "lightning_attention_commit",
    "lightning_attention_commit_int8",
    "lightning_attention_decode",
    "lightning_attention_decode_fp16",
    "lightning_attention_padded",
    "lightning_attention_prefill",
    "lightning_attention_replay",
    "lightning_attention_replay_int8",
    "lightning_attention_step",
    "lightning_attention_verify",
    "lightning_attention_verify_int8",
    "padded_cuts",
]
