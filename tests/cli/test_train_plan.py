"""`sevenfold train --dry-run` on the largest run file, without data and without a GPU."""

from pathlib import Path

import pytest
from cli_helpers import exit_code
from rich.console import Console

from sevenfold.cli.train_plan import print_plan
from sevenfold.config import parse_config
from sevenfold.models import preset
from sevenfold.models.training_memory import training_memory
from sevenfold.train import RunConfig, load_run_config
from sevenfold.train.toml import to_toml

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_plan_shows_mesh_memory_and_time_of_2048_ranks() -> None:
    console = Console(record=True, width=120, file=None, quiet=False, force_terminal=False)
    with console.capture() as shown:
        print_plan(load_run_config(CONFIGS / "minimax-text-01-2048.toml"), console)
    text = shown.get()
    assert "2,048 ranks; 16,777,216 tokens a step in 4 micro-batches of 512 rows of 8,192" in text
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in text.splitlines()
        if "│" in line
    }
    assert [cell.strip() for cell in rows["expert"]][::2] == ["32", "0, 4, ..., 124"]
    # 456,089,655,296 parameters over 256 ranks, and the norms and routers of each.
    assert rows["weights, fp32"][0].strip() == "6.64"
    assert rows["moments of AdamW, fp32"][0].strip() == "13.28"
    assert float(rows["if nothing overlaps"][0]) > float(rows["if all overlaps"][0])
    assert "assumed of a rank: 494 TFLOP/s" in text.replace("\n", " ")


def run_of_1b(rows: int, tokens: int, **tables: dict) -> RunConfig:
    model = preset("1b-hybrid").model_dump(mode="json")
    values = {
        "run": {"out": "run", "steps": 1},
        "data": {"path": "data", "seq_len": tokens},
        "model": model | {"max_position_embeddings": 2**20},
        "optimizer": {"lr": 0.01},
        "batch": {"tokens_per_step": rows * tokens},
        "precision": {"autocast": "bf16", "stream": "bf16"},
    }
    return parse_config(RunConfig, values | tables, "test")


def plan_of(config: RunConfig, **options: float) -> str:
    console = Console(width=120, file=None, force_terminal=False)
    with console.capture() as shown:
        print_plan(config, console, **options)
    return shown.get()


@pytest.mark.parametrize(
    ("rows", "tokens", "every", "context", "gib"),
    [(1, 757_760, 1, 1, 125), (1, 2**20, 1, 2, 99), (2, 8192, None, 1, 53)],
)
def test_a_plans_memory_is_that_of_training_memory(
    rows: int, tokens: int, every: int | None, context: int, gib: int
) -> None:
    tables = {"parallel": {"context": context}} if context > 1 else {}
    if every is not None:
        tables["checkpointing"] = {"every_layers": every}
    config = run_of_1b(rows, tokens, **tables)
    found = training_memory(
        config.model, rows * tokens // context, recompute_every=every, context_ranks=context
    ).total
    assert abs(found / 2**30 - gib) < 1
    [line] = [line for line in plan_of(config).splitlines() if "total, without" in line]
    printed = float(line.split("│")[2].strip())
    assert abs(printed / (found / 2**30) - 1) < 0.05


def test_a_plan_says_whether_a_gpu_holds_it() -> None:
    config = run_of_1b(2, 8192)
    assert "A rank fits a GPU of 80 GiB: it takes 53." in plan_of(config, gpu_gib=80)
    assert "A rank does not fit a GPU of 40 GiB: it takes 53." in plan_of(config, gpu_gib=40)
    assert "a GPU of" not in plan_of(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "--dry-run"], "--dry-run and --plot must not stand together"),
        (["--plot", "--stages", "s"], "--plot and --stages must not stand together"),
        (["--dry-run", "--longest", "16384"], "--longest must come with --stages, got none"),
        (["--stage-tokens", "9", "--questions", "q"], "--stage-tokens, --questions must come with"),
        (["--stages", "s", "--gpu-gib", "80"], "--gpu-gib must come with --dry-run, got none"),
    ],
)
def test_options_without_an_effect_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.toml"
    run.write_text(to_toml(run_of_1b(2, 8192).model_dump(mode="json")))
    assert exit_code("train", run, *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_the_program_plans_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.toml"
    run.write_text(to_toml(run_of_1b(2, 8192).model_dump(mode="json")))
    assert exit_code("train", run, "--dry-run", "--gpu-gib", "40") == 0
    assert "A rank does not fit a GPU of 40 GiB" in capsys.readouterr().out
