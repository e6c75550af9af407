import tomllib
from pathlib import Path

import pytest
from train_helpers import config_of

from sevenfold.config import ConfigError
from sevenfold.models.presets import preset
from sevenfold.train import RunConfig, load_run_config
from sevenfold.train.toml import to_toml

SMALLEST = """
[run]
out = "runs/a"
steps = 100
[data]
path = "data/austen"
[model]
preset = "nano-hybrid"
[optimizer]
lr = 3e-3
[batch]
tokens_per_step = 8192
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_eleven_lines_are_a_run(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, SMALLEST))
    assert config.model == preset("nano-hybrid")
    assert (config.run.out, config.run.device, config.data.seq_len) == (Path("runs/a"), "cpu", 1024)
    assert (config.optimizer.betas, config.schedule.kind) == ((0.9, 0.95), "constant")
    assert config.precision.autocast is None


def test_overrides_and_fields_over_a_preset(tmp_path: Path) -> None:
    file = write(tmp_path, SMALLEST)
    config = load_run_config(file, ["optimizer.lr=1e-4", "model.hidden_size=64", "run.out=b"])
    assert (config.optimizer.lr, config.model.hidden_size, config.run.out) == (1e-4, 64, Path("b"))
    assert config.model.layer_types == preset("nano-hybrid").layer_types


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    text = SMALLEST + "ramp = [{ from_tokens = 9000, tokens_per_step = 16384 }]\n[validation]\n"
    config = load_run_config(
        write(tmp_path, text + 'every_steps = 5\n[precision]\nautocast = "bf16"')
    )
    again = load_run_config(write(tmp_path, to_toml(config.model_dump(mode="json"))))
    assert again == config
    assert again.batch.ramp[0].tokens_per_step == 16384


def test_toml_strings_escape_and_none_is_left_out() -> None:
    values = {"a": 'quote " and \\ and\nline é', "b": None, "t": {"x": [1, 2.5, True], "u": {}}}
    assert tomllib.loads(to_toml(values)) == {"a": values["a"], "t": {"x": [1, 2.5, True]}}


def test_the_ramp_counts_tokens_read(run_values: dict) -> None:
    ramp = [
        {"from_tokens": 64, "tokens_per_step": 64},
        {"from_tokens": 200, "tokens_per_step": 128},
    ]
    config = config_of(run_values, batch={"tokens_per_step": 32, "ramp": ramp})
    assert [config.rows_at(sample) for sample in (0, 1, 2, 6, 7, 100)] == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"stepz": 5}}, r"run\.stepz is not a known key; did you mean run\.steps\?"),
        ({"batch": {"tokens_per_stp": 5}}, r"did you mean batch\.tokens_per_step\?"),
        ({"optimiser": {"lr": 1.0}}, r"optimiser is not a known key; did you mean optimizer\?"),
        (
            {"batch": {"ramp": [{"from_token": 5, "tokens_per_step": 32}]}},
            r"did you mean batch\.ramp\.0\.from_tokens\?",
        ),
        (
            {"run": {"device": "gpu"}},
            r"run\.device: device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'",
        ),
        ({"run": {"steps": 0}}, r"run\.steps must be valid: .*greater than or equal to 1, got 0"),
        (
            {"batch": {"tokens_per_step": 100}},
            r"tokens_per_step must be a multiple of seq_len = 32, got 100",
        ),
        (
            {"batch": {"ramp": [{"from_tokens": 5, "tokens_per_step": 40}]}},
            r"tokens_per_step must be a multiple of seq_len = 32, got 40",
        ),
        (
            {
                "batch": {
                    "ramp": [
                        {"from_tokens": 5, "tokens_per_step": 32},
                        {"from_tokens": 5, "tokens_per_step": 64},
                    ]
                }
            },
            r"ramp must have rising from_tokens, got \[5, 5\]",
        ),
        (
            {"batch": {"micro_batch_rows": 4}},
            r"micro_batch_rows must not exceed the 3 rows of a step, got 4",
        ),
        (
            {"checkpointing": {"every_layers": 3}},
            r"every_layers must not exceed the model's 2 layers, got 3",
        ),
        ({"schedule": {"warmup_steps": 9}}, r"must not exceed the run's 8 steps, got 9"),
        ({"precision": {"autocast": "fp8"}}, r"precision\.autocast must be valid: .* got 'fp8'"),
    ],
)
def test_a_fault_is_named_with_its_remedy(run_values: dict, sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(run_values, **sections)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALLEST.replace("nano-hybrid", "nano-hybrd"), "did you mean 'nano-hybrid'"),
        (SMALLEST.replace("preset", "hiden_size = 4\npreset"), "did you mean hidden_size"),
        (SMALLEST.replace("[model]\npreset", "[other]\npreset"), "model must be a table, got None"),
    ],
)
def test_a_fault_in_the_model_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(write(tmp_path, text))


def test_the_configuration_is_frozen(run_values: dict) -> None:
    config: RunConfig = config_of(run_values)
    with pytest.raises(ValueError, match="frozen"):
        config.run = config.run  # pyright: ignore[reportAttributeAccessIssue]
