"""What the tests of parallelism share: one tiny model, samples, cases, and runs over processes."""

import atexit
import json
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sevenfold.config import parse_config
from sevenfold.models import HybridModel, ModelConfig
from sevenfold.optim import AdamWConfig, build_adamw
from sevenfold.parallel import (
    Layout,
    ParallelConfig,
    Pipeline,
    build_model,
    clip_gradients,
    gradient_norm,
    groups_by_mesh,
)
from sevenfold.train.batch import read_step
from sevenfold.train.pipeline_step import forward_backward_by_stages
from sevenfold.train.step import forward_backward
from sevenfold.train.transform import narrow_stream, recompute_blocks, stream_dtype

WORKER = Path(__file__).with_name("parallel_worker.py")
SEQ_LEN = 16
MOE = {
    "num_local_experts": 4,
    "capacity_factor": 0.8,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.01,
    "shared_intermediate_size": 8,
}
MODEL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "layer_types": [
        "linear_attention",
        "full_attention",
        "linear_attention",
        "sliding_attention",
    ],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "intermediate_size": 8,
    "rotary_dim": 2,
    "sliding_window": 5,
}
# Each row's documents; those of one token and of a whole row among them.
ROWS = ((5, 11), (16,), (1, 2, 13), (9, 7), (3, 13), (16,), (12, 4))


@dataclass(frozen=True)
class Case:
    """A layout on a model, over a step of micro-batches."""

    name: str
    parallel: dict[str, int]
    micro_batch_rows: int = 4
    num_micro_batches: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False
    autocast: str | None = None
    stream: str | None = None
    is_slow: bool = False
    is_padded: bool = False

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(**self.parallel)

    @property
    def model_config(self) -> ModelConfig:
        return parse_config(ModelConfig, MODEL | self.model, "test")


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    labels: np.ndarray
    lengths: tuple[int, ...]
    num_bytes: int
    num_padding_tokens: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows by index, of which one has no label in its first half.

    is_padded: whether every fourth from row 2 on has padding in its last document's place.
    """

    is_padded: bool = False

    def sample(self, index: int) -> Row:
        ids, labels = np.random.default_rng(index).integers(0, 64, size=(2, SEQ_LEN))
        if index % 3 == 1:
            labels[: SEQ_LEN // 2] = -100
        lengths, padding = ROWS[index % len(ROWS)], 0
        if self.is_padded and index % 4 == 2:
            padding = lengths[-1]
            ids[-padding:], labels[-padding:] = 0, -100
        return Row(ids, labels, lengths, 40 + index, padding)


def build(case: Case, layout: Layout, dtype: torch.dtype) -> tuple[HybridModel, Any]:
    model = build_model(
        case.model_config,
        layout,
        seed=3,
        device=torch.device("cpu"),
        between=partial(transformed, case=case),
        dtype=dtype,
    ).train()
    optimizer = build_adamw(model.named_parameters(), AdamWConfig(lr=0.01))
    optimizer.param_groups[:] = groups_by_mesh(optimizer.param_groups)
    return model, optimizer


def transformed(model: HybridModel, case: Case) -> None:
    if case.stream is not None:
        narrow_stream(model)
    if case.recompute:
        recompute_blocks(model, 1)


def take_step(case: Case, model: HybridModel, optimizer: Any, layout: Layout) -> dict[str, Any]:
    """One step of training, as the loop takes it: what it computed, and this rank's tensors."""
    size = case.micro_batch_rows
    step = read_step(
        Rows(case.is_padded),
        0,
        case.num_micro_batches * size,
        micro_batch_rows=size,
        device=model.device,
        layout=layout,
    )
    if layout.config.pipeline == 1:
        losses = forward_backward(model, step, autocast=case.autocast)
    else:
        pipeline = Pipeline(model, layout, stream=stream_dtype(model, case.stream))
        losses = forward_backward_by_stages(model, pipeline, step, autocast=case.autocast)
    losses = layout.sum_over_shares(losses)
    norm = gradient_norm(model.named_parameters(), layout)
    clip_gradients(model.parameters(), 0.5, norm)
    gradients = {name: held(p.grad).clone() for name, p in model.named_parameters()}
    optimizer.step()
    weights = {name: held(p).clone() for name, p in model.named_parameters()}
    return {
        "losses": losses,
        "norm": norm,
        "labels": step.num_labels,
        "bytes": step.num_bytes,
        "gradients": gradients,
        "weights": weights,
        "place": layout.place,
    }


def held(x: Any) -> torch.Tensor:
    return (x.to_local() if hasattr(x, "to_local") else x).detach()


class RankServer:
    """A process that has imported everything, and forks the ranks of one job after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def run(self, job: str, num_ranks: int, folder: Path, arguments: tuple[str, ...]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"job": job, "ranks": num_ranks, "folder": str(folder), "arguments": arguments}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n", (folder / "errors").read_text()[-6000:]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@cache
def _server() -> RankServer:
    return RankServer()


def run_ranks(job: str, num_ranks: int, folder: Path, *arguments: str) -> None:
    """Run a job of parallel_worker.py in processes that write their results to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _server().run(job, num_ranks, folder, arguments)


def joined(case: Case, ranks: list[dict], kind: str, name: str, whole: torch.Tensor):
    """Put a tensor together from the parts of all ranks; each element from every rank with it.

    Returns the tensor as rank after rank wrote it: [copies] of equal tensors are one.
    """
    out = torch.full_like(whole, float("nan"), dtype=torch.float64)
    for rank in (rank for rank in ranks if name in rank[kind]):
        view = region(case.config, rank["place"], name, out)
        part = rank[kind][name].double()
        for piece, own in zip(view, part.chunk(len(view), tensor_dim(name) or 0), strict=True):
            known = ~torch.isnan(piece)
            assert torch.equal(piece[known], own[known]), f"{case.name}: {name} differs by rank"
            piece.copy_(own)
    assert not out.isnan().any(), f"{case.name}: {name} has parts that no rank holds"
    return out


def region(config: ParallelConfig, place: Any, name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """The views of a whole tensor that a rank holds, written independently of the package."""
    shards = config.shard * config.context
    index = place.data % config.shard * config.context + place.context
    width, part = config.tensor, place.tensor
    if ".experts." in name:
        x = x.chunk(config.expert)[place.expert]
        width, part = config.expert_tensor or config.tensor, place.expert_tensor
        size = config.expert * width
        index = (index * config.tensor + place.tensor) // size
        shards = shards * config.tensor // size
    dim = tensor_dim(name)
    halves = list(x.chunk(2, dim)) if "gate_up_proj" in name else [x]
    if dim is not None:
        halves = [half.chunk(width, dim)[part] for half in halves]
    divided = divided_dim(name, x, shards, halves[0], width)
    return [half.chunk(shards, divided)[index] for half in halves]


def divided_dim(name: str, x: torch.Tensor, shards: int, part: torch.Tensor, width: int) -> int:
    """Rows where they are whole, else the side of hidden_size."""
    has_whole_rows = tensor_dim(name) != 0 or (width == 1 and "gate_up_proj" not in name)
    return 0 if has_whole_rows and len(part) % shards == 0 else hidden_dim(name, x)


def tensor_dim(name: str) -> int | None:
    if name.endswith(("layernorm.weight", "mlp.gate.weight", "coefficient.weight")):
        return None
    if name == "norm.weight":
        return None
    if "experts.gate_up" in name:
        return 1
    if "experts.down" in name:
        return 2
    return 1 if any(k in name for k in ("out_proj", "o_proj", "down_proj")) else 0


def hidden_dim(name: str, x: torch.Tensor) -> int:
    if x.dim() == 1:
        return 0
    if "experts.gate_up" in name:
        return 2
    if "experts.down" in name:
        return 1
    return 0 if any(k in name for k in ("out_proj", "o_proj", "down_proj")) else 1
