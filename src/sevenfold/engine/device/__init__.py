"""The engine where the model lies on a GPU: one upload a step, decoding by captured graphs."""

from sevenfold.engine.device.capture import CudaCapture
from sevenfold.engine.device.footprint import (
    chunk_token_bytes,
    gathered_bytes,
    gathered_logits_bytes,
    graph_bytes,
)
from sevenfold.engine.device.graphs import DecodeGraphs, decode_batch_sizes, draft_token_sizes
from sevenfold.engine.device.prefill_graphs import prefill_sizes
from sevenfold.engine.device.runner import DeviceRunner, Stepped
from sevenfold.engine.device.verifier import DeviceVerifier, DraftLimits

__all__ = [
    "CudaCapture",
    "DecodeGraphs",
    "DeviceRunner",
    "DeviceVerifier",
    "DraftLimits",
    "Stepped",
    "chunk_token_bytes",
    "decode_batch_sizes",
    "draft_token_sizes",
    "gathered_bytes",
    "gathered_logits_bytes",
    "graph_bytes",
    "prefill_sizes",
]
