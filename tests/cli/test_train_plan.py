"""`sevenfold train --dry-run` on the largest run file, without data and without a GPU."""

from pathlib import Path

from rich.console import Console

from sevenfold.cli.train_plan import print_plan
from sevenfold.train import load_run_config

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
    assert rows["moments, fp32"][0].strip() == "13.28"
    assert float(rows["if nothing overlaps"][0]) > float(rows["if all overlaps"][0])
    assert "assumed of a rank: 494 TFLOP/s" in text.replace("\n", " ")
