"""Muon over ranks: matrices that fully_shard divides are gathered, and the run is that of one."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from parallel_helpers import MODEL, MOE, run_ranks
from test_parallel_runs import data  # noqa: F401

from sevenfold.config import ConfigError, parse_config
from sevenfold.models.checkpoint import load_model
from sevenfold.ops.testing import check_error
from sevenfold.parallel import build_model
from sevenfold.train import RunConfig, load_run_config, read_metrics, train
from sevenfold.train.toml import to_toml


def config_of(folder: Path, out: str, data: Path, parallel: dict) -> RunConfig:  # noqa: F811
    table = {
        "run": {"out": str(folder / out), "steps": 2},
        "data": {"path": str(data), "seq_len": 24},
        "model": MODEL | {"vocab_size": 304, "moe": MOE | {"capacity_factor": None}},
        "optimizer": {"lr": 0.01, "kind": "muon"},
        "batch": {"tokens_per_step": 8 * 24},
        "parallel": parallel,
    }
    return parse_config(RunConfig, table, "test")


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"shard": 2, "expert": 2}),
        pytest.param(4, {"shard": 2, "replicate": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"shard": 4, "expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_divided_run_is_the_run_of_one_process(
    num_ranks: int,
    parallel: dict,
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    divided = config_of(tmp_path, "divided", data, parallel)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(divided.model_dump(mode="json")), encoding="utf-8")
    run_ranks("runs", num_ranks, tmp_path / "ranks", str(file))
    train(config_of(tmp_path, "whole", data, {}))
    with patch("sevenfold.train.run.build_model", partial(build_model, dtype=torch.float64)):
        train(config_of(tmp_path, "exact", data, {}))
    runs = ("divided", "whole", "exact")
    losses = [
        torch.tensor([line["loss"] for line in read_metrics(tmp_path / out / "metrics.jsonl")])
        for out in runs
    ]
    check_error("loss", losses[0], losses[1], losses[2].double())
    weights = [load_model(tmp_path / out / "final").state_dict() for out in runs]
    for name, exact in weights[2].items():
        check_error(name, weights[0][name], weights[1][name], exact.double())
    assert load_run_config(file).optimizer.kind == "muon"


def test_ranks_that_hold_parts_of_matrices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.kind must be 'adamw' with parallel\.tensor"):
        config_of(tmp_path, "x", tmp_path, {"tensor": 2})
