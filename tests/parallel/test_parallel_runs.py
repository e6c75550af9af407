"""Whole runs over ranks: the metrics of one process, and checkpoints that any layout resumes."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from parallel_helpers import MODEL, MOE, run_ranks

from sevenfold.config import parse_config
from sevenfold.data import PrepareConfig, prepare
from sevenfold.models.checkpoint import load_model
from sevenfold.ops.testing import check_error
from sevenfold.parallel import build_model
from sevenfold.train import RunConfig, load_run_config, read_metrics, train
from sevenfold.train.toml import to_toml

WORDS = "the river held its colour while nine grey herons stood quite still beside old stones"
LAYOUTS = {
    "alone": {},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "ring": {"context": 2, "context_attention": "ring"},
    "expert": {"shard": 2, "expert": 2},
    "hybrid": {"replicate": 2, "shard": 2},
    "tensor-context": {"tensor": 2, "context": 2},
    "tensor-expert": {"tensor": 2, "shard": 2, "expert": 2},
    "four-experts": {"shard": 4, "expert": 4},
    "experts-apart": {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    "stages-context": {"pipeline": 2, "context": 2, "expert_tensor": 2},
}
ORDERS = [
    pytest.param(2, ["pipeline", "expert"], id="2"),
    pytest.param(
        2, ["tensor", "ring", "expert", "pipeline", "context"], id="2-more", marks=pytest.mark.slow
    ),
    pytest.param(
        4,
        [
            "tensor-context",
            "hybrid",
            "experts-apart",
            "tensor-expert",
            "stages-context",
            "four-experts",
        ],
        id="4",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    words = WORDS.split()
    for i in range(40):
        text = " ".join(words[(i * j + i) % len(words)] for j in range(5 + 7 * (i % 9)))
        (folder / "text" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    out = folder / "tokens"
    sources = (folder / "text",)
    prepare(PrepareConfig(sources=sources, out=out, vocab_size=300, validation_fraction=0.2))
    return out


def run_file(folder: Path, out: str, data: Path, steps: int, layout: str) -> str:
    table = {
        "run": {
            "out": str(folder / out),
            "steps": steps,
            "keep_checkpoints": 9,
            "async_checkpoints": steps % 2 == 1,
        },
        "data": {"path": str(data), "seq_len": 24},
        "model": MODEL | {"vocab_size": 304, "moe": MOE | {"capacity_factor": None}},
        # Where a gradient is all rounding, AdamW would make lr / eps of it.
        "optimizer": {"lr": 0.01, "eps": 1e-3},
        "batch": {"tokens_per_step": 8 * 24, "micro_batch_rows": 4},
        "validation": {"every_steps": 1, "num_samples": 4},
        "parallel": LAYOUTS[layout],
    }
    config = parse_config(RunConfig, table, "test")
    file = folder / f"{out}-{steps}-{layout}.toml"
    file.write_text(to_toml(config.model_dump(mode="json")), encoding="utf-8")
    return str(file)


def whole_run(folder: Path, data: Path, steps: int, out: str) -> list[dict]:
    result = train(load_run_config(Path(run_file(folder, out, data, steps, "alone"))))
    return read_metrics(result.folder / "metrics.jsonl")


def exact_run(folder: Path, data: Path, steps: int) -> list[dict]:
    """The same run in fp64."""
    with patch("sevenfold.train.run.build_model", partial(build_model, dtype=torch.float64)):
        return whole_run(folder, data, steps, "exact")


@pytest.mark.parametrize(("num_ranks", "order"), ORDERS)
def test_a_run_changes_its_layout_at_every_checkpoint(
    num_ranks: int, order: list[str], data: Path, tmp_path: Path
) -> None:
    last = len(order) + 1
    exact, eager = exact_run(tmp_path, data, last), whole_run(tmp_path, data, last, "whole")
    files = [run_file(tmp_path, "run", data, n + 1, layout) for n, layout in enumerate(order)]
    run_ranks("runs", num_ranks, tmp_path / "ranks", *files)
    found = whole_run(tmp_path, data, last, "run")  # and ends as one process

    assert [line["step"] for line in found] == list(range(1, last + 1))
    for name in ("loss", "grad_norm", "balance_loss", "validation_loss", "bits_per_byte"):
        three = [[line[name] for line in lines] for lines in (found, eager, exact)]
        ours, theirs, truth = (torch.tensor(values, dtype=torch.float64) for values in three)
        check_error(name, ours, theirs.float(), truth)
    for name in ("next_sample", "tokens"):
        assert [line[name] for line in found] == [line[name] for line in eager]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step-{n}" for n in range(1, last + 1)
    ]
    models = [load_model(tmp_path / out / "final") for out in ("run", "whole", "exact")]
    states = [model.state_dict() for model in models]
    for name, truth in states[2].items():
        check_error(name, states[0][name], states[1][name], truth)


@pytest.mark.slow
def test_torchrun_starts_a_run_and_the_first_rank_speaks(data: Path, tmp_path: Path) -> None:
    program = "from sevenfold.cli.main import main; main()"
    (tmp_path / "program.py").write_text(program)
    file = run_file(tmp_path, "run", data, 2, "context")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "program.py"), "train", file],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Done: 2 steps") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
