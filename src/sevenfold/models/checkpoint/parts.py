"""Which tensor of a file holds which span of which parameter, in each format."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sevenfold.models.checkpoint.schema import CheckpointFormat
from sevenfold.models.config import ModelConfig
from sevenfold.models.hybrid import HybridModel

# What transformers saves beside the weights: decays and angles, which we compute (docs/numerics.md
# rule 1: in a bf16 file they would be wrong).
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
    r"|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
_KEPT_IN_FULL = (".mlp.gate.weight", ".mlp.coefficient.weight")


@dataclass(frozen=True)
class Part:
    """One tensor of a file: elements start, start + 1, ... of a parameter laid out flat."""

    name: str
    parameter: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Index after the last element."""
        return self.start + math.prod(self.shape)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of HybridModel, tied ones once; allocates nothing."""
    with torch.device("meta"):
        model = HybridModel(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def list_parts(config: ModelConfig, to: CheckpointFormat) -> list[Part]:
    """Return every tensor of a model's file, in the order of the model's parameters.

    Args:
        config: the model.
        to: format of the file.

    Returns:
        Parts that cover each parameter exactly, in ascending spans.
    """
    name_parts = _own_parts if to == "sevenfold" else _published_parts
    shapes = parameter_shapes(config)
    return [part for name, shape in shapes.items() for part in name_parts(name, shape)]


def is_derived(name: str) -> bool:
    """Whether a published file's tensor is one that we compute and never read."""
    return _DERIVED.fullmatch(name) is not None


def stored_dtype(parameter: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a model of some dtype keeps a parameter: routers at least fp32.

    Source: the published checkpoints hold bf16 weights and fp32 routers.
    """
    in_full = parameter.endswith(_KEPT_IN_FULL)
    return torch.promote_types(dtype, torch.float32) if in_full else dtype


def _own_parts(parameter: str, shape: tuple[int, ...]) -> Iterator[Part]:
    yield Part(parameter, parameter, 0, shape)


def _published_parts(parameter: str, shape: tuple[int, ...]) -> Iterator[Part]:
    if parameter == "lm_head.weight":
        yield Part(parameter, parameter, 0, shape)
        return
    layer, in_mlp, rest = f"model.{parameter}".partition(".mlp.")
    if not in_mlp:
        yield Part(layer, parameter, 0, shape)
    elif rest.startswith("experts."):
        yield from _expert_parts(f"{layer}.block_sparse_moe.experts", parameter, shape)
    elif rest == "shared_mlp.gate_up_proj.weight":
        halves = [f"{layer}.shared_mlp.{half}_proj.weight" for half in ("gate", "up")]
        yield from _stacked(halves, parameter, (shape[0] // 2, shape[1]))
    elif rest.startswith(("shared_mlp.", "coefficient.")):
        yield Part(f"{layer}.{rest}", parameter, 0, shape)
    else:
        yield Part(f"{layer}.block_sparse_moe.{rest}", parameter, 0, shape)


def _expert_parts(prefix: str, parameter: str, shape: tuple[int, ...]) -> Iterator[Part]:
    num_experts, rows, columns = shape
    kinds = ("w1", "w3") if parameter.endswith("gate_up_proj") else ("w2",)
    names = [f"{prefix}.{e}.{kind}.weight" for e in range(num_experts) for kind in kinds]
    yield from _stacked(names, parameter, (rows // len(kinds), columns))


def _stacked(names: list[str], parameter: str, shape: tuple[int, int]) -> Iterator[Part]:
    for i, name in enumerate(names):
        yield Part(name, parameter, i * math.prod(shape), shape)
