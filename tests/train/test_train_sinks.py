"""What surrounds a run: TensorBoard, signals, the command line."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import typer
from train_helpers import MOE, config_of, model_table
from typer.testing import CliRunner

from sevenfold.cli.train import train_command
from sevenfold.config import ConfigError, UnsupportedError
from sevenfold.train import read_metrics, train
from sevenfold.train.plot import _smoothed
from sevenfold.train.signals import stop_on_signals
from sevenfold.train.toml import to_toml


def test_tensorboard_gets_every_number_of_every_step(run_values: dict) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(config_of(run_values, run={"tensorboard": True, "steps": 3}))
    accumulator = events.EventAccumulator(str(result.folder / "tensorboard"))
    accumulator.Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("grad_norm")]
    lines = read_metrics(result.folder / "metrics.jsonl")
    assert found == [(line["step"], line["grad_norm"]) for line in lines]
    assert "skipped" not in accumulator.Tags()["scalars"]


def test_tensorboard_gets_drop_and_load_of_every_layer(run_values: dict) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    moe = model_table(moe=MOE)
    result = train(config_of(run_values, model=moe, run={"tensorboard": True, "steps": 3}))
    accumulator = events.EventAccumulator(str(result.folder / "tensorboard"))
    accumulator.Reload()
    lines = read_metrics(result.folder / "metrics.jsonl")
    for name in ("dropped_by_layer", "load_by_layer"):
        tags = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith(name)]
        assert tags == [f"{name}/0", f"{name}/1"]
        found = [[event.value for event in accumulator.Scalars(tag)] for tag in tags]
        assert list(map(list, zip(*found, strict=True))) == [line[name] for line in lines]


def test_tensorboard_missing_is_an_error_with_its_remedy(
    run_values: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnsupportedError, match=r"pip install sevenfold\[tensorboard\]"):
        train(config_of(run_values, run={"tensorboard": True}))


class FakeTrackio:
    """Stands in for the library, which brings a web framework."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init(self, **settings: object) -> None:
        self.calls.append(("init", settings))

    def log(self, values: dict, step: int) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_trackio_gets_every_number_of_every_update(run_values: dict, monkeypatch) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    moe = model_table(moe=MOE)
    config = config_of(run_values, model=moe, run={"trackio": "p", "steps": 2})
    result = train(config)
    first, *logged, last = fake.calls
    assert first[1]["project"] == "p"
    assert (first[1]["name"], first[1]["resume"]) == ("run", "allow")
    assert first[1]["config"]["run"]["steps"] == 2
    lines = read_metrics(result.folder / "metrics.jsonl")
    assert [
        (step, values["loss"], [values[f"load_by_layer/{layer}"] for layer in range(2)])
        for _, step, values in logged
    ] == [(line["step"], line["loss"], line["load_by_layer"]) for line in lines]
    assert last == ("finish",)


def test_trackio_missing_is_an_error_with_its_remedy(run_values: dict, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UnsupportedError, match=r"got 'p'; pip install sevenfold\[trackio\]"):
        train(config_of(run_values, run={"trackio": "p"}))


def test_a_run_is_drawn_from_its_lines(app, run_file: Path, run_values: dict) -> None:
    assert CliRunner().invoke(app, [str(run_file), "--plot"]).exit_code == 1  # not trained yet
    moe = model_table(moe=MOE)
    config = config_of(run_values, model=moe, validation={"every_steps": 4, "num_samples": 2})
    train(config)
    for target in (run_file, config.run.out):
        done = CliRunner().invoke(app, [str(target), "--plot"], catch_exceptions=False)
        assert done.stdout == f"drawn in {config.run.out / 'metrics.png'}\n"
    data = (config.run.out / "metrics.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_mean_of_a_curve_is_that_of_its_last_values() -> None:
    values = [float(n) for n in range(120)]
    means = _smoothed(values)
    assert means[:3] == [0.0, 0.5, 1.5]
    assert means[-1] == 118.5


def test_a_signal_becomes_a_request() -> None:
    with stop_on_signals() as request:
        assert request.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.received is signal.SIGTERM


def test_another_thread_trains_and_leaves_signals_alone(run_values: dict) -> None:
    results = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(
        target=lambda: results.append(train(config_of(run_values, run={"steps": 2})))
    )
    thread.start()
    thread.join()
    assert results[0].progress.step == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def app() -> typer.Typer:
    program = typer.Typer()
    program.command("train")(train_command)
    return program


@pytest.fixture
def run_file(run_values: dict, tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(run_values), encoding="utf-8")
    return file


def test_the_command_trains_and_says_where_the_model_is(app, run_file: Path) -> None:
    done = CliRunner().invoke(app, [str(run_file), "--set", "run.steps=3", "--set=run.seed=2"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["step 1/3", "step 3/3"]
    final = run_file.parent / "run" / "final"
    assert lines[-1] == f"Done: 3 steps, model in {final}"
    again = CliRunner().invoke(app, [str(run_file), "--set", "run.steps=3", "--set=run.seed=2"])
    assert again.stdout == f"The run is complete: 3 steps, model in {final}\n"


def test_a_stopped_command_says_how_to_go_on(app, run_file: Path, monkeypatch) -> None:
    def stopping(config, *, on_step):
        def stop(record) -> None:
            on_step(record)
            os.kill(os.getpid(), signal.SIGINT)

        return train(config, on_step=stop)

    monkeypatch.setattr("sevenfold.cli.train.train", stopping)
    done = CliRunner().invoke(app, [str(run_file)])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == (
        f"Stopped by SIGINT after step 1 of 8; all is saved in {run_file.parent / 'run'}. "
        f"The same command goes on: sevenfold train {run_file}"
    )


def test_a_typo_in_a_run_file_names_the_nearest_key(app, run_file: Path) -> None:
    done = CliRunner().invoke(app, [str(run_file), "--set", "optimizer.learning=1"])
    assert isinstance(done.exception, ConfigError)
    done = CliRunner().invoke(app, [str(run_file), "--set", "optimizer.weight_dcay=0.1"])
    assert str(done.exception).endswith("did you mean optimizer.weight_decay?")
