"""Muon over ranks: matrices that ranks divide are gathered, and the run is that of one."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from parallel_helpers import MODEL, MOE, run_ranks
from test_parallel_runs import data  # noqa: F401

from sevenfold.config import parse_config
from sevenfold.models.checkpoint import load_model
from sevenfold.ops.testing import check_error
from sevenfold.parallel import build_model
from sevenfold.train import RunConfig, read_metrics, train
from sevenfold.train.toml import to_toml

# Each names parameters of one pipeline stage alone.
GROUPS = [
    {"names": ["layers.0.*"], "lr_factor": 0.5},
    {"names": ["lm_head.weight"], "weight_decay": 0.0},
]


def config_of(
    folder: Path,
    out: str,
    data: Path,  # noqa: F811
    parallel: dict,
    steps: int,
) -> RunConfig:
    table = {
        "run": {"out": str(folder / out), "steps": steps},
        "data": {"path": str(data), "seq_len": 24},
        "model": MODEL | {"vocab_size": 304, "moe": MOE | {"capacity_factor": None}},
        # Where a gradient is all rounding, AdamW would make lr / eps of it.
        "optimizer": {"lr": 0.01, "kind": "muon", "eps": 1e-3, "groups": GROUPS},
        "batch": {"tokens_per_step": 8 * 24, "micro_batch_rows": 4},
        "parallel": parallel,
    }
    return parse_config(RunConfig, table, "test")


# Each layout takes one step, and the next resumes its checkpoint.
LAYOUTS = {
    2: [
        {"shard": 2, "expert_tensor": 2},
        {"pipeline": 2},
        {"tensor": 2},
        {"context": 2, "expert": 2},
    ],
    4: [
        {"shard": 2, "replicate": 2},
        {"shard": 4, "expert": 2},
        {"tensor": 2, "shard": 2, "expert_tensor": 4},
        {"pipeline": 2, "tensor": 2, "expert": 2, "expert_tensor": 1},
    ],
}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_changes_its_layout_is_the_run_of_one_process(
    num_ranks: int,
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    files, layouts = [], LAYOUTS[num_ranks]
    for step, parallel in enumerate(layouts, 1):
        config = config_of(tmp_path, "divided", data, parallel, step)
        files.append(tmp_path / f"{step}.toml")
        files[-1].write_text(to_toml(config.model_dump(mode="json")), encoding="utf-8")
    run_ranks("runs", num_ranks, tmp_path / "ranks", *map(str, files))
    train(config_of(tmp_path, "whole", data, {}, len(layouts)))
    with patch("sevenfold.train.run.build_model", partial(build_model, dtype=torch.float64)):
        train(config_of(tmp_path, "exact", data, {}, len(layouts)))
    runs = ("divided", "whole", "exact")
    losses = [
        torch.tensor([line["loss"] for line in read_metrics(tmp_path / out / "metrics.jsonl")])
        for out in runs
    ]
    assert len(losses[0]) == len(layouts)
    check_error("loss", losses[0], losses[1], losses[2].double())
    weights = [load_model(tmp_path / out / "final").state_dict() for out in runs]
    for name, exact in weights[2].items():
        check_error(name, weights[0][name], weights[1][name], exact.double())
