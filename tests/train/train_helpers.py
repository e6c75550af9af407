"""What the tests of training share: a tiny model, run tables, samples made by hand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sevenfold.config import parse_config
from sevenfold.models import HybridModel, ModelConfig, init_weights
from sevenfold.train import RunConfig
from sevenfold.train.checkpoint import run_tensors
from sevenfold.train.loop import Trainer

VOCAB_SIZE = 300
MOE = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
}
# What a clock or an allocator decides; all else in metrics.jsonl must repeat bit for bit.
MEASURED = {"step_time_s", "tokens_per_s", "flops_per_s", "mfu", "peak_memory_bytes"}


def model_table(**changes) -> dict:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "rotary_dim": 4,
    } | changes


def run_table(data_path: Path, out: Path) -> dict:
    """The tables of a run of 8 steps of 3 rows."""
    return {
        "run": {"out": str(out), "steps": 8, "num_threads": 1},
        "data": {"path": str(data_path), "seq_len": 32},
        "model": model_table(),
        "optimizer": {"lr": 0.01},
        "batch": {"tokens_per_step": 96},
    }


def config_of(values: dict, **sections: dict) -> RunConfig:
    """A configuration from tables, with keys of some sections laid over them."""
    merged = dict(values)
    for name, keys in sections.items():
        merged[name] = {**merged.get(name, {}), **keys}
    return parse_config(RunConfig, merged, "test")


def tiny_model(*, seed: int = 1, dtype: torch.dtype = torch.float32, **changes) -> HybridModel:
    config = parse_config(ModelConfig, model_table(**changes), "test")
    return init_weights(HybridModel(config), seed=seed).to(dtype)


@dataclass(frozen=True)
class HandSample:
    input_ids: np.ndarray
    labels: np.ndarray
    lengths: tuple[int, ...]
    num_bytes: int
    num_padding_tokens: int = 0


def hand_sample(
    seed: int, *, lengths: tuple[int, ...] = (16,), num_ignored: int = 0, token: int | None = None
) -> HandSample:
    """Random ids below 290; num_ignored labels become -100, and `token` the first id."""
    numbers = np.random.default_rng(seed).integers(0, 290, size=(2, sum(lengths)))
    input_ids, labels = numbers[0], numbers[1]
    labels[:num_ignored] = -100
    if token is not None:
        input_ids[0] = token
    return HandSample(input_ids, labels, lengths, num_bytes=3 * (len(labels) - num_ignored))


@dataclass(frozen=True)
class HandLoader:
    """Serves given samples, over and over."""

    samples: list[HandSample]

    def sample(self, index: int) -> HandSample:
        return self.samples[index % len(self.samples)]


def copied_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and moments by name, as they are now."""
    return flat(run_tensors(trainer.model, trainer.optimizer))


def flat(tensors: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value.detach().clone()
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bit-equal."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def repeatable(lines: list[dict]) -> list[dict]:
    """Lines of metrics.jsonl without what is measured."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
