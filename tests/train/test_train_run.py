import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from train_helpers import MEASURED, MOE, config_of, differing, flat, model_table, repeatable

from sevenfold.config import CheckpointError, ConfigError, UnsupportedError
from sevenfold.data import PackedLoader, PrepareConfig, TokenDataset, prepare
from sevenfold.models.accounting import training_flops
from sevenfold.models.checkpoint import load_model
from sevenfold.train import RunConfig, StepRecord, TrainResult, load_run_config, read_metrics, train
from sevenfold.train.batch import read_step
from sevenfold.train.checkpoint import list_checkpoints, load_checkpoint, run_tensors
from sevenfold.train.run import _build
from sevenfold.train.run_data import open_data, training_loader


def metrics(result: TrainResult) -> list[dict]:
    return read_metrics(result.folder / "metrics.jsonl")


def newest_tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    data = open_data(config)
    trainer = _build(config, data, training_loader(data, {}), torch.device("cpu"))
    tensors = run_tensors(trainer.model, trainer.optimizer)
    load_checkpoint(list_checkpoints(config.run.out / "checkpoints")[-1], tensors)
    return flat(tensors)


def stop_at(step: int, number: signal.Signals):
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)

    return on_step


def test_a_run_learns_and_leaves_a_whole_folder(run_values: dict) -> None:
    config = config_of(run_values, run={"steps": 20})
    result = train(config)
    lines = metrics(result)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert sum(line["loss"] for line in lines[-3:]) < 0.8 * sum(line["loss"] for line in lines[:3])
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "checkpoints",
        "config.toml",
        "final",
        "metrics.jsonl",
        "run.json",
    ]
    assert load_run_config(result.folder / "config.toml") == config
    about = json.loads((result.folder / "run.json").read_text())
    assert (about["seed"], about["device"], about["num_threads"]) == (0, "cpu", 1)
    assert about["versions"]["torch"] == torch.__version__
    assert about["commit"] == head_commit()


def test_the_record_says_what_the_step_did(run_values: dict) -> None:
    records: list[StepRecord] = []
    config = config_of(run_values, run={"steps": 2, "peak_flops": 1e9})
    result = train(config, on_step=records.append)
    lines = metrics(result)
    assert [json.loads(record.as_json()) for record in records] == lines
    first = records[0]
    loader = PackedLoader(TokenDataset.open(config.data.path, "train"), seq_len=32, seed=0)
    samples = [loader.sample(i) for i in range(3)]
    num_labels = sum(int((sample.labels != -100).sum()) for sample in samples)
    num_bytes = sum(sample.num_bytes for sample in samples)
    nats = first.loss * num_labels
    assert first.bits_per_byte == nats / (
        torch.log(torch.tensor(2.0, dtype=torch.float64)) * num_bytes
    )
    assert (first.next_sample, first.tokens) == (3, 96)
    flops = training_flops(config.model, [n for sample in samples for n in sample.lengths])
    assert first.flops_per_s == flops / first.step_time_s
    assert first.mfu == first.flops_per_s / 1e9
    assert first.tokens_per_s == 96 / first.step_time_s
    assert first.peak_memory_bytes > 10_000_000
    assert result.progress.num_labels >= num_labels


def test_the_exported_model_is_the_one_that_was_trained(run_values: dict, data_path: Path) -> None:
    config = config_of(run_values, model=model_table(moe=MOE))
    result = train(config)
    assert result.final is not None
    model = load_model(result.final)
    weights = dict(model.named_parameters())
    # A run's checkpoint holds gate and up apart.
    trained = {n: x.view_as(weights[n]) for n, x in _weights(newest_tensors(config)).items()}
    assert differing(weights, trained) == []
    tokenizer = (result.final / "tokenizer.json").read_bytes()
    assert tokenizer == (data_path / "tokenizer.json").read_bytes()


def _weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "model."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def head_commit() -> str | None:
    """The commit of this checkout; None where the sources are no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


FEATURES = {
    "plain": {},
    "moe, bf16, recomputed, accumulated": {
        "model": model_table(moe=MOE),
        "precision": {"autocast": "bf16"},
        "checkpointing": {"every_layers": 1},
        "batch": {"micro_batch_rows": 2},
    },
    "ramp, schedule, validation": {
        "batch": {
            "tokens_per_step": 64,
            "ramp": [{"from_tokens": 200, "tokens_per_step": 128}],
        },
        "schedule": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 3},
        "validation": {"every_steps": 3, "num_samples": 2},
    },
}


@pytest.mark.parametrize(
    ("features", "number"),
    [*zip(FEATURES.values(), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM), strict=True)],
    ids=FEATURES,
)
def test_a_stopped_run_goes_on_bit_for_bit(
    run_values: dict, tmp_path: Path, features: dict, number: signal.Signals
) -> None:
    whole_config = config_of(run_values, **features)
    whole = train(whole_config)
    config = config_of(
        run_values, **features | {"run": {"out": str(tmp_path / "b"), "checkpoint_every_steps": 2}}
    )
    stopped = train(config, on_step=stop_at(5, number))
    assert (stopped.progress.step, stopped.final, stopped.signal_name) == (5, None, number.name)
    assert [line["step"] for line in metrics(stopped)] == [1, 2, 3, 4, 5]
    ended = train(config)
    assert (ended.resumed_step, ended.progress.step, ended.signal_name) == (5, 8, None)
    assert repeatable(metrics(ended)) == repeatable(metrics(whole))
    assert differing(newest_tensors(whole_config), newest_tensors(config)) == []


def test_handlers_of_signals_are_put_back(run_values: dict) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    train(config_of(run_values, run={"steps": 1}))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_second_ctrl_c_interrupts_at_once(run_values: dict) -> None:
    def twice(_: StepRecord) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config_of(run_values), on_step=twice)


def test_an_error_after_a_checkpoint_loses_only_what_came_after(run_values: dict) -> None:
    class BrokenError(Exception):
        pass

    def fail(record: StepRecord) -> None:
        if record.step == 7:
            raise BrokenError

    config = config_of(run_values, run={"checkpoint_every_steps": 3})
    with pytest.raises(BrokenError):
        train(config, on_step=fail)
    result = train(config)
    assert result.resumed_step == 6
    assert [line["step"] for line in metrics(result)] == list(range(1, 9))


def test_a_complete_run_is_left_alone_and_a_longer_one_goes_on(run_values: dict) -> None:
    config = config_of(run_values)
    first = train(config)
    again = train(config)
    assert (again.resumed_step, again.progress) == (8, first.progress)
    assert metrics(again) == metrics(first)
    longer = train(config_of(run_values, run={"steps": 10, "log_every_steps": 3}))
    assert (longer.resumed_step, longer.progress.step) == (8, 10)
    with pytest.raises(ConfigError, match=r"run\.steps must be at least the 10 steps .* got 9"):
        train(config_of(run_values, run={"steps": 9}))


def test_what_changes_memory_but_not_results_may_change(run_values: dict) -> None:
    train(config_of(run_values, run={"steps": 4}))
    changed = {"batch": {"micro_batch_rows": 1}, "checkpointing": {"every_layers": 1}}
    assert train(config_of(run_values, **changed)).progress.step == 8


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": model_table(hidden_size=32)}, r"model\.hidden_size must stay 16, got 32"),
        (
            {"model": model_table(moe=MOE)},
            r".*model\.moe\.num_local_experts must stay unset, got 2",
        ),
        ({"run": {"seed": 1}}, r"run\.seed must stay 0, got 1"),
        ({"optimizer": {"lr": 0.5}}, r"optimizer\.lr must stay 0\.01, got 0\.5"),
        ({"data": {"seq_len": 48}}, r"data\.seq_len must stay 32, got 48"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    run_values: dict, sections: dict, message: str
) -> None:
    train(config_of(run_values, run={"steps": 1}))
    with pytest.raises(ConfigError, match=f"holds another run: {message}.*give run.out another"):
        train(config_of(run_values, **sections))


def test_other_data_is_refused_and_moved_data_is_not(
    run_values: dict, data_path: Path, tmp_path: Path
) -> None:
    train(config_of(run_values, run={"steps": 2}))
    shutil.copytree(data_path, tmp_path / "moved")
    moved = config_of(run_values, run={"steps": 3}, data={"path": str(tmp_path / "moved")})
    assert train(moved).progress.step == 3
    source = tmp_path / "text"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.txt").write_text(f"quite different text {i} " * 20)
    other = tmp_path / "other"
    prepare(PrepareConfig(sources=(source,), out=other, vocab_size=300, validation_fraction=0.2))
    with pytest.raises(ConfigError, match=r"the data in .*other must be the same, got other data"):
        train(config_of(run_values, data={"path": str(other)}))


def test_a_folder_with_other_files_is_not_touched(run_values: dict, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.out must be a new or empty folder .* choose ano"):
        train(config_of(run_values))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    config = config_of(run_values, run={"out": str(tmp_path / "run" / "thesis.txt")})
    with pytest.raises(ConfigError, match=r"run\.out must be a folder, got the file"):
        train(config)


def test_the_model_ends_a_text_by_the_datas_token(run_values: dict, data_path: Path) -> None:
    final = train(config_of(run_values)).final
    assert final is not None
    end = TokenDataset.open(data_path, "train").end_of_text_id
    assert load_model(final).config.eos_token_id == end


def test_a_vocabulary_too_small_for_the_data_is_refused(run_values: dict) -> None:
    config = config_of(run_values, model=model_table(vocab_size=100))
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size must be at least the \d+ of .* got 100"
    ):
        train(config)


def test_a_missing_device_is_refused(run_values: dict) -> None:
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UnsupportedError, match=rf"run\.device must be present, got '{name}'"):
        train(config_of(run_values, run={"device": name}))


def test_validation_is_the_models_loss_on_fixed_samples(run_values: dict) -> None:
    config = config_of(run_values, validation={"every_steps": 3, "num_samples": 3})
    result = train(config)
    found = {line["step"]: line["validation_loss"] for line in metrics(result)}
    assert [step for step, loss in found.items() if loss is not None] == [3, 6, 8]
    assert result.final is not None
    data = TokenDataset.open(config.data.path, "validation")
    loader = PackedLoader(data, seq_len=32, seed=5, shuffle=False)
    step = read_step(loader, 0, 3, micro_batch_rows=None, device=torch.device("cpu"))
    model = load_model(result.final).eval()
    [micro] = step.micro_batches
    with torch.no_grad():
        loss = model.cross_entropy(model.hidden(micro.input_ids, micro.batch).hidden, micro.labels)
    assert found[8] == loss.item() / step.num_labels
    config = config_of(run_values, validation={"every_steps": 3, "num_samples": 10_000})
    with pytest.raises(ConfigError, match=r"num_samples must not exceed the \d+ rows .* got 10000"):
        train(config)


def test_settings_of_the_process_are_put_back(run_values: dict) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    train(config_of(run_values, run={"steps": 1, "num_threads": 2, "deterministic": True}))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_repeats(run_values: dict, tmp_path: Path) -> None:
    moe = model_table(moe=MOE)
    runs = [
        train(
            config_of(run_values, model=moe, run={"out": str(tmp_path / n), "deterministic": True})
        )
        for n in "ab"
    ]
    assert repeatable(metrics(runs[0])) == repeatable(metrics(runs[1]))
    assert metrics(runs[0])[0].keys() > MEASURED


def test_a_damaged_checkpoint_is_named(run_values: dict, tmp_path: Path) -> None:
    config = config_of(run_values, run={"steps": 2})
    train(config)
    (tmp_path / "run" / "checkpoints" / "step-2" / "progress.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"remove .*step-2 to go on from an earlier checkpoint"
    ):
        train(config)
