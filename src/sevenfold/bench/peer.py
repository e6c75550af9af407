"""The peer: transformers' MiniMaxForCausalLM with the weights of one of our models."""

import tempfile
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sevenfold.config import UnsupportedError
from sevenfold.models import HybridModel
from sevenfold.models.checkpoint import save_model


def load_peer(
    model: HybridModel,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return transformers' model with the same weights.

    Args:
        model: ours.
        device: where the peer shall be; None is the CPU.
        dtype: of its weights.

    Raises:
        UnsupportedError: transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise UnsupportedError(
            "the benchmark must have its peer, got no transformers; pip install sevenfold[bench]"
        )
    # By name: its table of contents takes pyright half a minute to read.
    transformers: Any = import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/peer"
        save_model(model, path, format="hf")
        peer = transformers.MiniMaxForCausalLM.from_pretrained(path, dtype=dtype)
        return peer if device is None else peer.to(device)


def peer_logits(peer: Any, input_ids: Tensor) -> Tensor:
    """Run the peer on whole rows."""
    return peer(input_ids, use_cache=False).logits


def peer_loss(peer: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Run the peer's training forward, its balance loss included."""
    # Its labels are the inputs themselves: it shifts them by one.
    return peer(input_ids, labels=labels, use_cache=False, output_router_logits=True).loss


@torch.inference_mode()
def peer_prefill(peer: Any, input_ids: Tensor) -> int:
    """Run the peer on a prompt [1, T] as generation does: its cache filled, one row of logits.

    Returns:
        The next token; it waits for the device.
    """
    logits = peer(input_ids, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def peer_generate(peer: Any, input_ids: Tensor, num_tokens: int) -> Tensor:
    """Generate greedily with the peer's own loop; the new tokens of the first row."""
    return peer_generate_batch(peer, input_ids, num_tokens)[0]


def peer_generate_batch(peer: Any, input_ids: Tensor, num_tokens: int) -> Tensor:
    """Generate greedily after each row [B, T] with the peer's own loop: [B, num_tokens]."""
    out = peer.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, input_ids.shape[1] :]
