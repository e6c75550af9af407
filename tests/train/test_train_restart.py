"""A lost rank under torchrun: all processes start anew from the last save."""

import subprocess
import sys
from pathlib import Path

import pytest
from train_helpers import config_of, repeatable

from sevenfold.train import read_metrics
from sevenfold.train.toml import to_toml

SCRIPT = """
import os, signal, sys
from pathlib import Path
from sevenfold.train import load_run_config, train

config = load_run_config(Path(sys.argv[1]))
first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
lost_at = int(sys.argv[2])
if lost_at and first_life and os.environ["RANK"] == "1":
    # Rank 1 has no listener: it dies where it reads the samples of a step.
    from sevenfold.data import PackedLoader
    sample = PackedLoader.sample
    def dying(self, index):
        if index >= lost_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(self, index)
    PackedLoader.sample = dying
train(config)
"""


def torchrun(script: Path, run_file: Path, lost_at: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += ["--nproc-per-node=2", str(script), str(run_file), str(lost_at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-12000:]


@pytest.mark.slow
def test_a_lost_rank_costs_the_steps_since_the_last_save(run_values: dict, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    lines = []
    for name, lost_at in (("whole", 0), ("lost", 19)):
        config = config_of(
            run_values,
            run={"out": str(tmp_path / name), "checkpoint_every_steps": 2},
            batch={"tokens_per_step": 128},
            parallel={"shard": 2},
        )
        run_file = tmp_path / f"{name}.toml"
        run_file.write_text(to_toml(config.model_dump(mode="json")))
        torchrun(script, run_file, lost_at)
        lines.append(repeatable(read_metrics(tmp_path / name / "metrics.jsonl")))
        assert (tmp_path / name / "final" / "model.safetensors").exists()
    assert [line["step"] for line in lines[1]] == list(range(1, 9))
    assert lines[0] == lines[1]
