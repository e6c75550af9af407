import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_run import metrics, newest_tensors
from train_helpers import MOE, config_of, differing, model_table, repeatable

from sevenfold.train import read_metrics, train
from sevenfold.train.toml import to_toml

WORKER = Path(__file__).with_name("kill_worker.py")
SIGKILLED = "-9"


def kill_and_resume(config, run_file: Path, moments: list[str]) -> list[str]:
    """Run a configuration through a series of kills; returns the exit code at each moment."""
    run_file.write_text(to_toml(config.model_dump(mode="json")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(run_file), *moments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names, codes = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert list(names) == [*moments, "end"], done.stderr
    return list(codes)


@pytest.mark.parametrize("beside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(
    beside: bool, run_values: dict, tmp_path: Path
) -> None:
    features = {
        "model": model_table(moe=MOE),
        "schedule": {"kind": "cosine", "warmup_steps": 3},
        "validation": {"every_steps": 5, "num_samples": 2},
    }
    steps = {"steps": 26, "checkpoint_every_steps": 3, "keep_checkpoints": 2}
    steps["async_checkpoints"] = beside
    whole_config = config_of(run_values, **features, run=steps)
    whole = train(whole_config)

    chosen = random.Random(7)
    lines = [f"line:{number}:{chosen.uniform(0, 0.02):.4f}" for number in (2, 8, 17)]
    moments = [lines[0], "saving", lines[1], "metadata", "removing", lines[2]]
    killed = config_of(run_values, **features, run=steps | {"out": str(tmp_path / "killed")})
    codes = kill_and_resume(killed, tmp_path / "run.toml", moments)

    assert codes == [SIGKILLED] * len(moments) + ["0"]
    assert repeatable(read_metrics(tmp_path / "killed" / "metrics.jsonl")) == repeatable(
        metrics(whole)
    )
    assert differing(newest_tensors(whole_config), newest_tensors(killed)) == []
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        exported = (tmp_path / "killed" / "final" / name).read_bytes()
        assert exported == (whole.folder / "final" / name).read_bytes()
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-24", "step-26"]
