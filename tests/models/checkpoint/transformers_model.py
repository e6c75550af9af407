"""transformers' MiniMax class in fp64 with our weights, in a file that takes seconds to import."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax

from sevenfold.models import HybridModel


class DoubleTorch(ModuleType):
    """torch, but what asks for float32 gets float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_double() -> Iterator[None]:
    """transformers' class computes norms, angles and routing in fp32 whatever it is given."""
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(modeling_minimax, "torch", DoubleTorch("torch")),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def their_double(folder: Path, ours: HybridModel, *, our_slopes: bool) -> MiniMaxForCausalLM:
    config = MiniMaxConfig.from_pretrained(folder, attn_implementation="eager")
    config._experts_implementation = "eager"
    theirs = MiniMaxForCausalLM(config).double()
    weights = {their_name(name): p for name, p in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all("_decay" in name or "slope_rate" in name for name in missing)
    if our_slopes:
        for layer, our_layer in zip(theirs.model.layers, ours.layers, strict=True):
            if isinstance(layer.self_attn, modeling_minimax.MiniMaxLightningAttention):
                put_slopes(layer.self_attn, -our_layer.self_attn.log_decay.double())
    return theirs.eval()


def their_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def put_slopes(theirs: Any, slopes: Tensor) -> None:
    theirs.slope_rate = slopes[:, None, None]
    decays = theirs.decay_factors(theirs.slope_rate)
    theirs.query_decay, theirs.key_decay, theirs.diagonal_decay = decays
