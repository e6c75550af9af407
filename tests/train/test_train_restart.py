"""A lost rank or node under torchrun: all processes start anew from the last save."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_helpers import config_of, repeatable, run_table

from sevenfold.train import read_metrics
from sevenfold.train.toml import to_toml

SCRIPT = """
import os, signal, sys
from pathlib import Path
from sevenfold.train import load_run_config, train

config = load_run_config(Path(sys.argv[1]))
dies = {
    "": False,
    "rank": os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1",
    "node": True,
}[sys.argv[2]]
if dies:
    # Not every rank has a listener: it dies where it reads the samples of a step.
    from sevenfold.data import PackedLoader
    sample = PackedLoader.sample
    def dying(self, index):
        if index >= 19:
            if sys.argv[2] == "node":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(self, index)
    PackedLoader.sample = dying
train(config)
"""


# As docs/training.md sets it: without it a restart may read what the ranks before it wrote.
STORES_OF_THEIR_OWN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command_of(run_file: Path, lost: str, *options: str) -> list[str]:
    """torchrun's command; lost is what dies in step 5: "rank" 1 once, "node" its own, "" none."""
    script = run_file.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*launcher, str(script), str(run_file), lost]


def run_file_of(data_path: Path, folder: Path) -> Path:
    config = config_of(
        run_table(data_path, folder / "run"),
        run={"checkpoint_every_steps": 2},
        batch={"tokens_per_step": 128},
        parallel={"shard": 2},
    )
    file = folder / "run.toml"
    file.write_text(to_toml(config.model_dump(mode="json")))
    return file


def lines_of_a_whole_run(run_file: Path) -> list[dict]:
    run = run_file.parent / "run"
    lines = repeatable(read_metrics(run / "metrics.jsonl"))
    assert (run / "final" / "model.safetensors").exists()
    assert [line["step"] for line in lines] == list(range(1, 9))
    return lines


def one_node(run_file: Path, lost: str) -> None:
    options = ("--standalone", "--max-restarts=1", "--nproc-per-node=2")
    command = command_of(run_file, lost, *options)
    environment = os.environ | STORES_OF_THEIR_OWN
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-12000:]


@pytest.fixture(scope="module")
def whole(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The lines of a run that loses nothing."""
    run_file = run_file_of(data_path, tmp_path_factory.mktemp("whole"))
    one_node(run_file, "")
    return lines_of_a_whole_run(run_file)


@pytest.mark.slow
def test_a_lost_rank_costs_the_steps_since_the_last_save(
    whole: list[dict], data_path: Path, tmp_path: Path
) -> None:
    run_file = run_file_of(data_path, tmp_path)
    one_node(run_file, "rank")
    assert lines_of_a_whole_run(run_file) == whole


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def node(run_file: Path, lost: str, port: int, is_host: int) -> Iterator[subprocess.Popen]:
    """A node of two, as docs/training.md starts it; all of them are on this machine."""
    options = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d")
    options += ("--rdzv-id=run", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost")
    options += (f"--rdzv-conf=is_host={is_host}",)
    environment = os.environ | STORES_OF_THEIR_OWN
    with subprocess.Popen(command_of(run_file, lost, *options), env=environment) as agent:
        try:
            yield agent
        finally:
            agent.terminate()  # and with it its rank, which a kill would leave alive


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_the_last_save(
    whole: list[dict], data_path: Path, tmp_path: Path
) -> None:
    run_file, port = run_file_of(data_path, tmp_path), free_port()
    with node(run_file, "", port, is_host=1) as stays:
        with node(run_file, "node", port, is_host=0) as dies:
            assert dies.wait(timeout=120) == -9
        with node(run_file, "", port, is_host=0) as joins:
            assert joins.wait(timeout=120) == 0
        assert stays.wait(timeout=60) == 0
    assert lines_of_a_whole_run(run_file) == whole
