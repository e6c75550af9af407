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
    rows = rows_of(text)
    assert rows["expert"][::2] == ["32", "0, 4, ..., 124"]
    # 456,089,655,296 parameters over 256 ranks, and the norms and routers of each.
    assert rows["weights, fp32"][0] == "6.64"
    assert rows["moments of AdamW, fp32"][0] == "13.28"
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


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of the tables by their first."""
    lines = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_a_plan_counts_what_muon_holds_and_gathers() -> None:
    """456 B: of the matrices one moment; all experts' gate and up of a layer are 6.75 GiB in bf16.

    By hand: gathered, stacked, and two of the iteration, and twice 32 squares of 6,144.
    """
    overrides = ["optimizer.kind=muon", "parallel.expert=1", "parallel.expert_tensor=4"]
    config = load_run_config(CONFIGS / "minimax-text-01-2048.toml", overrides)
    rows = rows_of(plan_of(config))
    held, twice = 1_781_796_128, 2 * 200_064 * 6144 // 256  # of embedding and head
    assert rows["moments of Muon and AdamW, fp32"] == [f"{4 * (held + twice) / 2**30:.2f}"] * 2
    gathered = (4 * 32 * 18_432 * 6144 + 2 * 32 * 6144**2) * 2
    assert rows["matrices that Muon has whole"] == ["0.00", f"{gathered / 2**30:.2f}"]
    assert "what Muon gathers" in plan_of(config)
    assert "matrices that Muon has whole" not in rows_of(plan_of(run_of_1b(1, 8192)))


def test_a_plan_says_what_an_update_takes_where_that_is_most() -> None:
    run = run_of_1b(1, 1024, optimizer={"lr": 0.01, "kind": "muon"})
    rows = rows_of(plan_of(run))
    backward, update = map(float, rows["total, without the allocator's overhead"])
    assert update > backward
    between = (backward + update) / 2
    assert f"it takes {update:.2f}" in plan_of(run, gpu_gib=between)
    assert "does not fit" in plan_of(run, gpu_gib=between)


RAMP = {"ramp": [{"from_tokens": 10**9, "tokens_per_step": 2**20}]}
LAW = {"critical": {"max_tokens_per_step": 2**20}}


@pytest.mark.parametrize("later", [RAMP, LAW], ids=["ramp", "critical"])
@pytest.mark.parametrize("micro_batch_rows", [None, 256, 4])
def test_a_plan_is_for_the_largest_step_too(later: dict, micro_batch_rows: int | None) -> None:
    def run(size: int, **more: dict) -> RunConfig:
        batch = {"tokens_per_step": size, "micro_batch_rows": micro_batch_rows} | more
        return run_of_1b(1, 4096, batch=batch)

    text = plan_of(run(2**16, **later), gpu_gib=1)
    first, largest, _ = rows_of(text)["total, without the allocator's overhead"]
    rows = min(16, micro_batch_rows or 16)
    count = 16 // rows
    assert f"first step: 65,536 tokens in {count} micro-batches of {rows} rows of 4,096" in text
    rows = micro_batch_rows or 256
    count = 256 // rows
    assert f"largest step: 1,048,576 tokens in {count} micro-batches of {rows} rows" in text
    [last, _] = rows_of(plan_of(run(2**20)))["total, without the allocator's overhead"]
    assert largest == last
    assert f"it takes {largest}" in text
    assert float(first.replace(",", "")) <= float(largest.replace(",", ""))
    products = rows_of(text)["products"]
    assert float(products[1]) > 15 * float(products[0])


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
