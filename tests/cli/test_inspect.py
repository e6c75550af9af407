"""`sevenfold inspect`: the tables of a preset, a run file and a checkpoint."""

import re
from pathlib import Path

import pytest
from cli_helpers import TinyRun, exit_code, run_cli

from sevenfold.cli.inspect import CONTEXTS, _unit, find_config
from sevenfold.models import preset, preset_names
from sevenfold.models.accounting import count_parameters
from sevenfold.models.checkpoint import read_config
from sevenfold.train import load_run_config


def rows(output: str) -> dict[str, list[str]]:
    """First cell of each table row -> its other cells."""
    lines = [line.split("│") for line in output.splitlines() if "│" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_preset() -> None:
    """MiniMax-Text-01, worked by hand: figures of the report and of system-facts.md."""
    result = run_cli("inspect", "minimax-text-01")
    assert result.exit_code == 0
    assert result.output.startswith(
        "minimax-text-01: 80 layers (70 linear_attention, 10 full_attention), 6144 wide, "
        "64 heads of 128\n"
    )
    table = rows(result.output)
    assert table["total"] == ["456,089,655,296"]
    assert table["active (without embedding, head, norms)"] == ["45,943,357,440"]
    assert "dense feed-forward, shared experts" not in table  # it has none
    assert [f"{context:,}" in table for context in CONTEXTS] == [True] * 4
    prefill, token, training, kv, state, moved = table["1,048,576"]
    assert (kv, state) == ("42.9 GB", "294 MB")
    # 2 x (45,943,357,440 + 200,064 x 6,144), 70 states of 4 x 64 x 128^2, 10 x 4 x 64 x 128 a pair
    assert token == "438 GFLOP"
    assert prefill == "279 PFLOP"
    assert training == "838 PFLOP"
    assert moved == "138 GB"
    assert "smaller than the KV of an all-softmax twin from 1,024 tokens up" in result.output
    assert table["linear, layer 0"] == ["1.1", "256"]
    assert table["10 full"] == ["all", "all"]


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_is_cut_in_80_columns(name: str) -> None:
    result = run_cli("inspect", name, columns=80)
    assert result.exit_code == 0
    assert "…" not in result.output
    assert rows(result.output)["total"] == [f"{count_parameters(preset(name)).total:,}"]


def test_forms_have_what_they_have() -> None:
    softmax, lightning = (run_cli("inspect", f"nano-{form}") for form in ("softmax", "lightning"))
    assert "all-softmax twin" not in softmax.output
    assert rows(softmax.output)["8 full"] == ["all", "all"]
    assert "linear attention" not in rows(softmax.output)
    assert "softmax attention" not in rows(lightning.output)
    assert rows(lightning.output)["1,024"][3] == "0 B"


def test_a_window_reaches_as_far_as_it_is_wide(tmp_path: Path, tiny_run: TinyRun) -> None:
    text = tiny_run.run_file.read_text().replace('"full_attention"', '"sliding_attention"')
    run = tmp_path / "run.toml"
    run.write_text(text.replace("head_dim = 8", "head_dim = 8\nsliding_window = 1500"))
    table = rows(run_cli("inspect", run).output)
    assert table["1 sliding"] == ["1,500", "1,500"]
    # 2 x 1 head x 8 x 2 B, for 1,500 tokens at most
    assert [table[f"{n:,}"][3] for n in CONTEXTS] == ["32.8 kB", "48 kB", "48 kB", "48 kB"]


def test_a_run_file_and_its_checkpoint_are_the_same_model(tiny_run: TinyRun) -> None:
    config = load_run_config(tiny_run.run_file).model
    assert find_config(str(tiny_run.run_file)) == config
    assert find_config(str(tiny_run.checkpoint)) == read_config(tiny_run.checkpoint)
    by_run, by_checkpoint = (
        run_cli("inspect", target).output.split("\n", 1)
        for target in (tiny_run.run_file, tiny_run.checkpoint)
    )
    assert by_run[1] == by_checkpoint[1]
    layers = "2 layers (1 linear_attention, 1 full_attention), 16 wide, 2 heads of 8"
    assert by_run[0] == f"{tiny_run.run_file}: {layers}"
    assert rows(by_run[1])["total"] == [f"{count_parameters(config).total:,}"]


@pytest.mark.parametrize(
    ("target", "nearest"), [("nano-hybird", "nano-hybrid"), ("bench2b", "bench-2b")]
)
def test_a_misspelt_name(target: str, nearest: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("inspect", target) == 2
    error = capfd.readouterr().err
    assert re.search(f"target must be .*'{target}'.*{nearest}", error)
    assert error.endswith("a target is a preset, a checkpoint folder or a run file\n")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_234_567, "1.23 MB"),
        (5.4e9, "5.4 GB"),
        (2e12, "2 TB"),
        (3e15, "3 PB"),
        (4.56e18, "4.56 EB"),
    ],
)
def test_units(number: float, text: str) -> None:
    assert _unit(number, "B") == text


def test_a_plan_for_several_devices() -> None:
    """The node that MiniMax-Text-01 was sized for: int8 weights, more than 1M tokens."""
    result = run_cli("inspect", "minimax-text-01", "--on", "8x80", columns=80)
    assert result.exit_code == 0
    assert "…" not in result.output
    assert "Served on 8 x 80 GB, a tenth reserved; per device" in result.output
    table = rows(result.output)
    assert table["bf16"][-2:] == ["does not fit", ""]
    assert table["int8"] == ["57.6 GB", "36.7 MB", "5.37 GB", "14.4 GB", "2,796,427 tokens"]
    assert table["int8-experts"][-1] == "2,340,955 tokens"
    dense = run_cli("inspect", "nano-lightning", "--on", "1x0.5")
    assert rows(dense.output)["int8"][-1] == "any"


@pytest.mark.parametrize("on", ["8", "0x80", "8x", "8x80GB", "x80"])
def test_devices_that_are_none(on: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("inspect", "nano", "--on", on) == 2
    assert f"on must be a number of devices, x and the GB of each, got {on!r}" in (
        capfd.readouterr().err.replace("\n", " ")
    )
